"""DSpark's context keys and values."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import layer_frame as f
from kernels.device import has_kernels
from kernels.jit import entry, native
from kernels.layer_native import store_key_value
from kernels.reference import store_kv as reference
from kernels.rms_norm import norm_row
from kernels.simd import never_inline
from kernels.values import PAGE, LayerCache, RopeTable


def store_context_kv(
    kv: Tensor,
    k_norms: Tensor,
    caches: Sequence[LayerCache],
    rope: RopeTable,
    positions: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    """Write each drafter layer's context K/V to its pages.

    kv [T, layers · 2 · kv_heads · D] holds k|v layer by layer, projected from the target's features. K goes
    through k_norms [layers, D] and rope at its own position, V is stored as it is.

    Raises:
        ValueError: tensors that do not fit together, a position outside the rope table, a slot outside a cache.
    """
    if has_kernels(kv):
        from kernels.triton import store_kv as device

        device.store_context_kv(kv, k_norms, caches, rope, positions, slots, eps)
        return
    native = kv.dtype == k_norms.dtype == torch.float32 and all(cache.address for cache in caches)
    head_dim = k_norms.shape[1]
    if not native or head_dim % 32 or head_dim > 512 or not kv.is_contiguous() or not k_norms.is_contiguous():
        reference.store_context_kv(kv, k_norms, caches, rope, positions, slots, eps)
        return
    rows = kv.shape[0]
    for cache in caches:
        if cache.k.shape != caches[0].k.shape:
            raise ValueError("the layers' caches differ in shape")
    pages, kv_heads, cache_dim = caches[0].pages, caches[0].kv_heads, caches[0].head_dim
    fits = cache_dim == head_dim == 2 * rope.cos.shape[1] and len(k_norms) == len(caches)
    if not fits or kv.shape[1] != len(caches) * 2 * kv_heads * head_dim:
        raise ValueError("kv, k_norms, the caches and the rope table do not fit together")
    for tensor in (positions, slots):
        if tensor.dtype != torch.int64 or not tensor.is_contiguous() or len(tensor) != rows:
            raise ValueError("positions and slots must be contiguous int64, one a row")
    head = np.empty(head_dim + 16, np.float32)
    words = np.array([cache.address for cache in caches], np.int64)
    stored = _store(
        rows,
        len(caches),
        kv_heads,
        head_dim,
        kv.data_ptr(),
        k_norms.data_ptr(),
        words.ctypes.data,
        *rope.words,
        rope.cos.shape[0],
        positions.data_ptr(),
        slots.data_ptr(),
        pages * PAGE,
        eps,
        head.ctypes.data,
    )
    if not stored:
        raise ValueError("a position lies outside the rope table, or a slot outside the cache")


@entry
def _store(rows, layers, kv_heads, head_dim, kv, k_norms, caches, cos, sin, angles, positions, slots, limit, eps, head):
    for row in range(rows):
        position, slot = f.word(positions, row), f.word(slots, row)
        if position < 0 or position >= angles or slot < 0 or slot >= limit:
            return False
    for row in range(rows):
        source = kv + row * layers * 2 * kv_heads * head_dim * 4
        position, slot = f.word(positions, row), f.word(slots, row)
        store_row(source, position, slot, layers, kv_heads, head_dim, k_norms, caches, cos, sin, eps, head)
    return True


@native
def store_row(kv, position, slot, layers, kv_heads, head_dim, k_norms, caches, cos, sin, eps, head):
    """One row's k|v of every layer to its slot; `head` is room for a head of floats."""
    never_inline()
    size, at = head_dim * 4, position * head_dim * 2
    for layer in range(layers):
        cache = f.word(caches, layer)
        k = kv + layer * 2 * kv_heads * size
        for kv_head in range(kv_heads):
            norm_row(k + kv_head * size, k_norms + layer * size, head, head_dim, eps)
            store_key_value(
                head,
                k + (kv_heads + kv_head) * size,
                cos + at,
                sin + at,
                head_dim,
                f.word(cache, f.CACHE_K),
                f.word(cache, f.CACHE_V),
                kv_heads,
                kv_head,
                slot,
                f.word(cache, f.CACHE_ITEM),
            )
