"""One decoder layer over paged keys and values, in plain torch."""

from __future__ import annotations

from torch import Tensor

from kernels.reference.matmul import matmul
from kernels.reference.pages import paged_attention, write_slots
from kernels.reference.rms_norm import rms_norm
from kernels.reference.rope import apply_rope
from kernels.reference.silu_mul import gelu_tanh_mul, silu_mul
from kernels.values import SILU, LayerCache, LayerWeights, RopeTable, Rows


def project_qkv(
    x: Tensor, weights: LayerWeights, rope: RopeTable, positions: Tensor, qkv_start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated q [T, heads, D] and k [T, kv_heads, D], and v [T, kv_heads, D], of x [T, H]."""
    qkv = matmul(rms_norm(x, weights.input_norm, weights.eps), weights.qkv)
    return split_qkv(qkv if qkv_start is None else qkv + qkv_start, weights, rope, positions)


def split_qkv(qkv: Tensor, weights: LayerWeights, rope: RopeTable, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated q [T, heads, D] and k, and v [T, kv_heads, D], of qkv [T, (heads + 2 kv_heads) · D]."""
    if weights.qkv_bias is not None:
        qkv = qkv + weights.qkv_bias
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if weights.rope is not None:
        rope = weights.rope
    q = apply_rope(rms_norm(q, weights.q_norm, weights.eps), rope, positions)
    k = apply_rope(rms_norm(k, weights.k_norm, weights.eps), rope, positions)
    if weights.scale is not None:  # attention multiplies by head_dim^−½
        q = q * (weights.scale * head_dim**0.5)
    return q, k, v


def finish_layer(x: Tensor, attended: Tensor, weights: LayerWeights) -> None:
    """Add the attention's output projection and the gated block to x [T, H], in place."""
    gate = silu_mul if weights.activation == SILU else gelu_tanh_mul
    delta = matmul(attended, weights.o)
    if weights.post_attention_norm is not None:
        delta = rms_norm(delta, weights.post_attention_norm, weights.eps)
    x += delta
    gate_up = matmul(rms_norm(x, weights.post_norm, weights.eps), weights.gate_up)
    delta = matmul(gate(gate_up), weights.down)
    if weights.post_feedforward_norm is not None:
        delta = rms_norm(delta, weights.post_feedforward_norm, weights.eps)
    x += delta


def decoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cache: LayerCache,
    rope: RopeTable,
    rows: Rows,
    qkv_start: Tensor | None = None,
) -> None:
    """Run the layer on x [T, H] in place; store the rows' keys and values, then attend causally.

    Each row sees positions 0 … its own, or the last of them that a window holds: all earlier ones lie in the cache or
    among this batch's rows.
    `qkv_start` [T, (heads + 2 kv_heads) · head_dim] is added to the rows' projected q, k and v.
    """
    q, k, v = project_qkv(x, weights, rope, rows.positions, qkv_start)
    rows = rows.of(weights)
    write_slots(cache, k, v, rows.slots)
    finish_layer(x, paged_attention(q, cache, rows, weights.window), weights)
