"""Keys, values and queries between the projection and attention: norms, rope and the write to the pages, fused.

One program a row and head. Where a head's values are not all finite they become 0 and the key NaN, see
`kernels.triton.paged_attention`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import UNFUSED, narrow
from kernels.values import PAGE, LayerCache, LayerWeights, RopeTable


def store_kv(
    qkv: Tensor, weights: LayerWeights, cache: LayerCache, rope: RopeTable, positions: Tensor, slots: Tensor
) -> Tensor:
    """Normed and rotated queries [T, heads, D] of qkv [T, (heads + 2 kv_heads) · D]; K and V go to the slots [T].

    Same as `kernels.reference.store_kv.store_kv`. Positions outside the rope table and slots outside the
    cache are the caller's error: the device is not asked.
    """
    q = qkv.new_empty((qkv.shape[0], weights.heads, weights.head_dim))
    _project(qkv, weights, rope, positions, q, cache.k, cache.v, slots, cache.k.stride(), cache.v.stride())
    return q


def split_qkv(
    qkv: Tensor, weights: LayerWeights, rope: RopeTable, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `store_kv`, but K and V are returned, [T, kv_heads, D] in the cache's `dtype`: a draft block's are scratch."""
    rows, head_dim = qkv.shape[0], weights.head_dim
    q = qkv.new_empty((rows, weights.heads, head_dim))
    k, v = (qkv.new_empty((rows, weights.kv_heads, head_dim), dtype=dtype) for _ in range(2))
    strides = (weights.kv_heads * head_dim * PAGE, head_dim, 1, weights.kv_heads * head_dim)
    slots = torch.arange(rows, device=qkv.device)
    _project(qkv, weights, rope, positions, q, k, v, slots, strides, (strides[0], strides[1], strides[3], 1))
    return q, k, v


def _project(
    qkv: Tensor,
    weights: LayerWeights,
    rope: RopeTable,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
) -> None:
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim or not qkv.is_contiguous():
        raise ValueError("qkv must be contiguous and hold queries, keys and values")
    if 2 * rope.cos.shape[1] != head_dim:
        raise ValueError(f"the rope table is for heads of {2 * rope.cos.shape[1]}, not {head_dim}")
    if len(qkv) == 0:
        return
    bias = weights.qkv_bias
    _store[(len(qkv), heads + kv_heads)](
        qkv, qkv if bias is None else bias, weights.q_norm, weights.k_norm, rope.cos, rope.sin, positions, slots,
        q, k, v, heads, kv_heads, head_dim, weights.eps, *k_strides, *v_strides,
        BIAS=bias is not None, PAGE_SIZE=PAGE, HALF=triton.next_power_of_2(head_dim // 2), num_warps=1, **UNFUSED,
    )  # fmt: skip


def store_context_kv(
    kv: Tensor,
    k_norms: Tensor,
    caches: Sequence[LayerCache],
    rope: RopeTable,
    positions: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    """Same as `kernels.store_kv.store_context_kv`, one launch a layer."""
    kv_heads, head_dim = caches[0].kv_heads, caches[0].head_dim
    width = 2 * kv_heads * head_dim
    if kv.shape[1] != len(caches) * width or tuple(k_norms.shape) != (len(caches), head_dim):
        raise ValueError("kv, k_norms, the caches and the rope table do not fit together")
    if 2 * rope.cos.shape[1] != head_dim or kv.stride(-1) != 1:
        raise ValueError("kv, k_norms, the caches and the rope table do not fit together")
    if len(kv) == 0:
        return
    for layer, cache in enumerate(caches):
        if cache.k.shape != caches[0].k.shape:
            raise ValueError("the layers' caches differ in shape")
        _store_context[(len(kv), kv_heads)](
            kv[:, layer * width :], k_norms[layer], rope.cos, rope.sin, positions, slots, cache.k, cache.v,
            kv.stride(0), kv_heads, head_dim, eps, *cache.k.stride(), *cache.v.stride(),
            PAGE_SIZE=PAGE, HALF=triton.next_power_of_2(head_dim // 2), num_warps=1, **UNFUSED,
        )  # fmt: skip


@triton.jit
def _load_halves(ptr, half, column):
    """The two halves of a head, float32, side by side: [2, HALF]."""
    side = tl.arange(0, 2)[:, None]
    return tl.load(ptr + side * half + column[None, :], (column < half)[None, :], 0.0)


@triton.jit
def _rotate(x, cos_ptr, sin_ptr, position, half, column):
    """Half-split rope of x [2, HALF] float32."""
    inside = column < half
    cos = tl.load(cos_ptr + position * half + column, inside, 0.0)
    sin = tl.load(sin_ptr + position * half + column, inside, 0.0)
    is_first = tl.arange(0, 2)[:, None] == 0
    first = tl.sum(tl.where(is_first, x, 0.0), 0)
    second = tl.sum(tl.where(is_first, 0.0, x), 0)
    return tl.where(is_first, (first * cos - second * sin)[None, :], (second * cos + first * sin)[None, :])


@triton.jit
def _norm_rotate(x, norm_ptr, cos_ptr, sin_ptr, position, half, column, eps, kind: tl.constexpr):
    weight = _load_halves(norm_ptr, half, column)
    mean = tl.sum(tl.sum(x * x, 1), 0) / (2 * half)
    scale = tl.math.div_rn(1.0, tl.sqrt_rn(mean + eps))
    x = narrow(x * scale, kind).to(tl.float32) * weight.to(tl.float32)
    return _rotate(x, cos_ptr, sin_ptr, position, half, column)


@triton.jit
def _write(
    k, v, k_ptr, v_ptr, slot, head, half, column, k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    v = narrow(v, v_ptr.dtype.element_ty)
    broken = tl.max(tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1), 0) > 0
    k, v = tl.where(broken, float("nan"), k), tl.where(broken, 0.0, v)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    dim = tl.arange(0, 2)[:, None] * half + column[None, :]
    inside = (column < half)[None, :]
    k_at = page * k_page + head * k_head + offset * k_slot + dim * k_dim
    v_at = page * v_page + head * v_head + offset * v_slot + dim * v_dim
    tl.store(k_ptr + k_at, narrow(k, k_ptr.dtype.element_ty), inside)
    tl.store(v_ptr + v_at, v.to(v_ptr.dtype.element_ty), inside)


@triton.jit
def _store(
    qkv, bias, q_norm, k_norm, cos, sin, positions, slots, q_ptr, k_ptr, v_ptr,
    heads, kv_heads, head_dim, eps, k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
    BIAS: tl.constexpr, PAGE_SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (row, head): queries come first, then each key together with its value."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = head_dim // 2
    column = tl.arange(0, HALF)
    source = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim
    kind: tl.constexpr = qkv.dtype.element_ty
    x = _load_halves(source, half, column).to(tl.float32)
    if BIAS:
        x = narrow(x + _load_halves(bias + head * head_dim, half, column).to(tl.float32), kind).to(tl.float32)
    position = tl.load(positions + row)
    if head < heads:
        x = _norm_rotate(x, q_norm, cos, sin, position, half, column, eps, kind)
        to = q_ptr + (row * heads + head) * head_dim + tl.arange(0, 2)[:, None] * half + column[None, :]
        tl.store(to, narrow(x, q_ptr.dtype.element_ty), (column < half)[None, :])
    else:
        x = _norm_rotate(x, k_norm, cos, sin, position, half, column, eps, kind)
        v = _load_halves(source + kv_heads * head_dim, half, column).to(tl.float32)
        if BIAS:
            on_v = _load_halves(bias + (head + kv_heads) * head_dim, half, column).to(tl.float32)
            v = narrow(v + on_v, kind).to(tl.float32)
        _write(
            x, v, k_ptr, v_ptr, tl.load(slots + row), head - heads, half, column,
            k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim, PAGE_SIZE,
        )  # fmt: skip


@triton.jit
def _store_context(
    kv, k_norm, cos, sin, positions, slots, k_ptr, v_ptr,
    stride, kv_heads, head_dim, eps, k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
    PAGE_SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = head_dim // 2
    column = tl.arange(0, HALF)
    source = kv + row * stride + head * head_dim
    k = _load_halves(source, half, column).to(tl.float32)
    v = _load_halves(source + kv_heads * head_dim, half, column).to(tl.float32)
    k = _norm_rotate(k, k_norm, cos, sin, tl.load(positions + row), half, column, eps, kv.dtype.element_ty)
    _write(
        k, v, k_ptr, v_ptr, tl.load(slots + row), head, half, column,
        k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim, PAGE_SIZE,
    )  # fmt: skip
