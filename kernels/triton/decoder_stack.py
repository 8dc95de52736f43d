"""The target's and the drafter's layers on a device: products by its library, what lies between them fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.matmul import matmul
from kernels.triton.paged_attention import block_attention, paged_attention, tile_rows
from kernels.triton.rms_norm import add_rms_norm, rms_norm
from kernels.triton.silu_mul import silu_mul
from kernels.triton.store_kv import split_qkv, store_kv
from kernels.values import BlockRows, LayerCache, LayerWeights, RopeTable, Rows


def decoder_stack(
    x: Tensor,
    layers: Sequence[LayerWeights],
    caches: Sequence[LayerCache],
    rope: RopeTable,
    rows: Rows,
    capture: tuple[int, ...] = (),
    qkv_start: Tensor | None = None,
) -> Tensor | None:
    """Same as `kernels.decoder_stack.decoder_stack`, and for one layer as `kernels.decoder_layer.decoder_layer`."""
    first = layers[0]
    features = x.new_empty((len(x), len(capture) * x.shape[1])) if capture else None
    tiles = tile_rows(rows, first.heads, first.kv_heads, caches[0].k.dtype, first.head_dim)
    _capture(features, x, capture, -1)
    normed = rms_norm(x, first.input_norm, first.eps)
    for index, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
        qkv = matmul(normed, weights.qkv)
        if qkv_start is not None:
            qkv += qkv_start
        q = store_kv(qkv, weights, cache, rope, rows.positions, rows.slots)
        normed = _finish(x, paged_attention(q, cache, rows, tiles), layers, index)
        _capture(features, x, capture, index)
    return features


def draft_stack(
    x: Tensor, layers: Sequence[LayerWeights], caches: Sequence[LayerCache], rope: RopeTable, block: BlockRows
) -> None:
    """Same as `kernels.draft_stack.draft_stack`."""
    offsets = torch.arange(block.block_size, device=x.device)
    positions = (block.anchor_positions[:, None] + offsets).flatten()
    normed = rms_norm(x, layers[0].input_norm, layers[0].eps)
    for index, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
        q, k, v = split_qkv(matmul(normed, weights.qkv), weights, rope, positions, cache.k.dtype)
        normed = _finish(x, block_attention(q, k, v, cache, block), layers, index)


def _finish(x: Tensor, attended: Tensor, layers: Sequence[LayerWeights], index: int) -> Tensor:
    """Add the output projection and the SwiGLU block to x in place; the next layer's normed input, if there is one."""
    weights = layers[index]
    normed = add_rms_norm(x, matmul(attended, weights.o), weights.post_norm, weights.eps)
    delta = matmul(silu_mul(matmul(normed, weights.gate_up)), weights.down)
    if index + 1 == len(layers):
        x += delta
        return x
    return add_rms_norm(x, delta, layers[index + 1].input_norm, layers[index + 1].eps)


def _capture(features: Tensor | None, x: Tensor, capture: tuple[int, ...], layer: int) -> None:
    if features is not None:
        for column, wanted in enumerate(capture):
            if wanted == layer:
                features[:, column * x.shape[1] : (column + 1) * x.shape[1]] = x
