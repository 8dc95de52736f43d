"""Writing keys and values to their pages, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.reference.decoder_layer import split_qkv
from kernels.reference.pages import write_slots
from kernels.reference.rms_norm import rms_norm
from kernels.reference.rope import apply_rope
from kernels.values import LayerCache, LayerWeights, RopeTable


def store_kv(
    qkv: Tensor, weights: LayerWeights, cache: LayerCache, rope: RopeTable, positions: Tensor, slots: Tensor
) -> Tensor:
    """Normed and rotated queries [T, heads, D] of qkv [T, (heads + 2 kv_heads) · D]; K and V go to the slots [T]."""
    q, k, v = split_qkv(qkv, weights, rope, positions)
    write_slots(cache, k, v, slots)
    return q


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
    """
    kv_heads, head_dim = caches[0].kv_heads, caches[0].head_dim
    parts = kv.view(kv.shape[0], len(caches), 2, kv_heads, head_dim)
    for layer, cache in enumerate(caches):
        k = apply_rope(rms_norm(parts[:, layer, 0], k_norms[layer], eps), rope, positions)
        write_slots(cache, k, parts[:, layer, 1], slots)
