"""DSpark's context keys and values: parity with plain torch, and rows that do not see each other."""

from __future__ import annotations

import pytest
import torch

from kernels.context import ContextWeights, store_context
from kernels.matmul import matmul, pack
from kernels.reference.store_kv import store_context_kv as reference
from kernels.rms_norm import rms_norm
from kernels.rope import rope_table
from kernels.store_kv import store_context_kv
from tests.kernels.layers import Shape, copied, poisoned_cache, same_bits


@pytest.mark.parametrize("shape", [Shape(), Shape(kv_heads=1, head_dim=64), Shape(kv_heads=3, head_dim=128)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_match_the_reference(shape: Shape, rows: int, dtype: torch.dtype) -> None:
    layers = 2
    kv = torch.randn(rows, layers * 2 * shape.kv_heads * shape.head_dim)
    norms = torch.rand(layers, shape.head_dim)
    rope = rope_table(64, shape.head_dim, 1e4)
    positions = torch.arange(rows) + 3
    slots = torch.randperm(5 * 16)[:rows]
    caches = [poisoned_cache(shape, 5, dtype) for _ in range(layers)]
    mirrors = [copied(cache) for cache in caches]
    store_context_kv(kv, norms, caches, rope, positions, slots, 1e-6)
    reference(kv, norms, mirrors, rope, positions, slots, 1e-6)
    near = {"atol": 1e-5, "rtol": 1e-4 if dtype == torch.float32 else 2**-7}  # the last bit of a bfloat16
    for cache, mirror in zip(caches, mirrors, strict=True):
        torch.testing.assert_close(cache.k, mirror.k, **near, equal_nan=True)
        assert same_bits(cache.v.nan_to_num(), mirror.v.nan_to_num())

    singly = [poisoned_cache(shape, 5, dtype) for _ in range(layers)]
    for row in range(rows):
        one = slice(row, row + 1)
        store_context_kv(kv[one], norms, singly, rope, positions[one], slots[one], 1e-6)
    assert all(same_bits(a.k.nan_to_num(), b.k.nan_to_num()) for a, b in zip(caches, singly, strict=True))


def test_what_points_outside_is_refused() -> None:
    shape = Shape()
    kv, norms = torch.randn(2, 2 * shape.kv_heads * shape.head_dim), torch.ones(1, shape.head_dim)
    rope, caches = rope_table(8, shape.head_dim, 1e4), [poisoned_cache(shape, 2)]
    inside = torch.tensor([0, 1])
    for positions, slots in ((inside + 7, inside), (inside, inside + 31), (inside - 1, inside)):
        with pytest.raises(ValueError, match="outside"):
            store_context_kv(kv, norms, caches, rope, positions, slots, 1e-6)
    with pytest.raises(ValueError, match="fit"):
        store_context_kv(kv[:, 1:].contiguous(), norms, caches, rope, inside, inside, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 37])
def test_context_is_the_composition_of_its_parts(rows: int, dtype: torch.dtype, three_threads: None) -> None:
    shape, layers, width = Shape(), 3, 72
    generator = torch.Generator().manual_seed(rows)
    kv_width = layers * 2 * shape.kv_heads * shape.head_dim
    fc = pack(torch.randn(shape.hidden, width, generator=generator).to(dtype))
    kv = pack(torch.randn(kv_width, shape.hidden, generator=generator).to(dtype))
    norm, k_norms = torch.rand(shape.hidden), torch.rand(layers, shape.head_dim)
    caches, mirrors = (tuple(poisoned_cache(shape, 5, dtype) for _ in range(layers)) for _ in range(2))
    rope, positions, slots = rope_table(64, shape.head_dim, 1e4), torch.arange(rows) + 3, torch.randperm(80)[:rows]
    features = torch.randn(rows, width, generator=generator)
    weights = ContextWeights(fc, norm, kv, k_norms, 1e-6, caches)
    assert weights.native
    store_context(features, weights, rope, positions, slots)
    parts = matmul(rms_norm(matmul(features, fc), norm, 1e-6), kv)
    store_context_kv(parts, k_norms, mirrors, rope, positions, slots, 1e-6)
    for cache, mirror in zip(caches, mirrors, strict=True):
        assert same_bits(cache.k.nan_to_num(), mirror.k.nan_to_num())
        assert same_bits(cache.v.nan_to_num(), mirror.v.nan_to_num())
    for bad_positions, bad_slots in ((positions + 64, slots), (positions, slots + 80), (positions - 9, slots)):
        with pytest.raises(ValueError, match="outside"):
            store_context(features, weights, rope, bad_positions, bad_slots)
    with pytest.raises(ValueError, match="fit"):
        store_context(features[:, 1:].contiguous(), weights, rope, positions, slots)
    with pytest.raises(ValueError, match="int64"):
        store_context(features, weights, rope, positions[1:], slots)
