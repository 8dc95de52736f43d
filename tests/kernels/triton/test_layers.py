"""What lies between the products of a layer, and whole stacks of layers: parity with plain torch."""

from __future__ import annotations

import pytest
import torch

from kernels.matmul import PackedMatrix
from kernels.reference import decoder_layer as reference_layer
from kernels.reference import decoder_stack as reference_stack
from kernels.reference import draft_stack as reference_draft
from kernels.reference import rms_norm as reference_norm
from kernels.reference import silu_mul as reference_silu
from kernels.reference import store_kv as reference_store
from kernels.rope import rope_table
from kernels.triton.decoder_stack import decoder_stack, draft_stack
from kernels.triton.rms_norm import add_rms_norm, rms_norm
from kernels.triton.silu_mul import silu_mul
from kernels.triton.store_kv import store_context_kv, store_kv
from kernels.values import BlockRows, LayerCache, LayerWeights
from tests.kernels.layers import Shape, page_table, ragged_rows
from tests.kernels.triton.cases import DEVICE, NEAR, filled_cache, poisoned_cache, same_bits, seeded
from tests.kernels.triton.test_paged_attention import on_device

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [Shape(), Shape(hidden=80, intermediate=50, heads=3, kv_heads=1, head_dim=48)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(DEVICE, dtype)


def make_layer(shape: Shape, dtype: torch.dtype, seed: int = 1, bias: bool = False) -> LayerWeights:
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def matrix(n: int, k: int) -> PackedMatrix:
        return PackedMatrix(n, k, normal(n, k, dtype=dtype, seed=seed + n) * k**-0.5, None)

    def gains(n: int) -> torch.Tensor:
        return 1 + 0.2 * normal(n, dtype=dtype, seed=n)

    return LayerWeights(
        input_norm=gains(shape.hidden),
        qkv=matrix(width, shape.hidden),
        q_norm=gains(shape.head_dim),
        k_norm=gains(shape.head_dim),
        o=matrix(shape.hidden, shape.heads * shape.head_dim),
        post_norm=gains(shape.hidden),
        gate_up=matrix(2 * shape.intermediate, shape.hidden),
        down=matrix(shape.hidden, shape.intermediate),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        eps=1e-6,
        qkv_bias=0.1 * normal(width, dtype=dtype) if bias else None,
    )


def copied(cache: LayerCache) -> LayerCache:
    return LayerCache(cache.k.mT.clone().mT, cache.v.clone())


def assert_same_pages(a: LayerCache, b: LayerCache, dtype: torch.dtype) -> None:
    torch.testing.assert_close(a.k, b.k, **NEAR[dtype], equal_nan=True)
    assert same_bits(a.v.nan_to_num(), b.v.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 80, 1000])
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, delta, weight = (normal(*size, dtype=dtype, seed=i) for i, size in enumerate([(3, width), (3, width), (width,)]))
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference_norm.rms_norm(x, weight, 1e-6), **NEAR[dtype])
    expected_x = x.clone()
    expected = reference_norm.add_rms_norm(expected_x, delta, weight, 1e-6)
    torch.testing.assert_close(add_rms_norm(x, delta, weight, 1e-6), expected, **NEAR[dtype])
    assert same_bits(x, expected_x)


def test_a_residual_whose_rows_are_not_contiguous_is_refused() -> None:
    x = normal(8, 3).T
    with pytest.raises(ValueError, match="contiguous"):
        add_rms_norm(x, normal(3, 8), torch.ones(8, device=DEVICE), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = normal(3, 2 * 1050, dtype=dtype) * 4
    torch.testing.assert_close(silu_mul(gate_up), reference_silu.silu_mul(gate_up), **NEAR[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_values_and_queries(shape: Shape, dtype: torch.dtype, bias: bool) -> None:
    layer, rope = make_layer(shape, dtype, bias=bias), rope_table(64, shape.head_dim, 1e4, DEVICE)
    qkv = normal(5, layer.qkv.n, dtype=dtype)
    positions = torch.tensor([7, 0, 63, 16, 3], device=DEVICE)
    slots = torch.tensor([5, 31, 16, 47, 0], device=DEVICE)
    cache = poisoned_cache(shape, 3, dtype)
    mirror = copied(cache)
    q = store_kv(qkv, layer, cache, rope, positions, slots)
    expected = reference_store.store_kv(qkv, layer, mirror, rope, positions, slots)
    torch.testing.assert_close(q, expected, **NEAR[dtype])
    assert_same_pages(cache, mirror, dtype)


def test_a_value_that_is_not_finite_breaks_its_key() -> None:
    """So that rows which see the slot learn of it from its score."""
    shape = SHAPES[0]
    layer, rope = make_layer(shape, torch.float32), rope_table(8, shape.head_dim, 1e4, DEVICE)
    qkv = normal(2, layer.qkv.n)
    qkv[0, -1] = torch.inf  # of the last head's value
    cache = poisoned_cache(shape, 1, torch.float32)
    at = torch.arange(2, device=DEVICE)
    store_kv(qkv, layer, cache, rope, at, at)
    broken = cache.k[0, :, :, :2].isnan().all(1)
    assert broken.tolist() == [[False, False], [True, False]]
    assert (cache.v[0, 1, 0] == 0).all() and cache.v[0, :, :2].isfinite().all()


def test_a_value_that_the_cache_cannot_hold_breaks_its_key() -> None:
    """The largest float32 is no bfloat16."""
    shape = SHAPES[0]
    layer, rope = make_layer(shape, torch.float32), rope_table(8, shape.head_dim, 1e4, DEVICE)
    qkv = normal(1, layer.qkv.n)
    qkv[0, -1] = torch.finfo(torch.float32).max
    cache = poisoned_cache(shape, 1, torch.bfloat16)
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    store_kv(qkv, layer, cache, rope, at, at)
    assert cache.k[0, :, :, 0].isnan().all(1).tolist() == [False, True]
    assert cache.v[0, :, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_context_keys_and_values(dtype: torch.dtype) -> None:
    shape, layers = SHAPES[1], 2
    kv = normal(4, layers * 2 * shape.kv_heads * shape.head_dim, dtype=dtype)
    norms = 1 + 0.2 * normal(layers, shape.head_dim, dtype=dtype)
    rope = rope_table(32, shape.head_dim, 1e4, DEVICE)
    positions, slots = torch.tensor([[3, 31, 0, 9], [40, 2, 17, 0]], device=DEVICE)
    caches = [poisoned_cache(shape, 3, dtype) for _ in range(layers)]
    mirrors = [copied(cache) for cache in caches]
    store_context_kv(kv, norms, caches, rope, positions, slots, 1e-6)
    reference_store.store_context_kv(kv, norms, mirrors, rope, positions, slots, 1e-6)
    for cache, mirror in zip(caches, mirrors, strict=True):
        assert_same_pages(cache, mirror, dtype)
    with pytest.raises(ValueError, match="fit"):
        store_context_kv(kv[:, 1:], norms, caches, rope, positions, slots, 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stacks_match_the_reference(shape: Shape) -> None:
    layers = [make_layer(shape, torch.float32, seed) for seed in (1, 2)]
    rope = rope_table(64, shape.head_dim, 1e4, DEVICE)
    table = page_table([21, 3], 8, seeded(1))
    caches = [poisoned_cache(shape, 8, torch.float32) for _ in layers]
    mirrors = [copied(cache) for cache in caches]
    for spans in ([(0, 18), (0, 2)], [(18, 21), (2, 3)]):
        rows = on_device(ragged_rows(spans, table))
        x = normal(len(rows.positions), shape.hidden)
        mirror = x.clone()
        features = decoder_stack(x, layers, caches, rope, rows, (-1, 0))
        expected = reference_stack.decoder_stack(mirror, layers, mirrors, rope, rows, (-1, 0))
        torch.testing.assert_close(x, mirror, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_a_poisoned_row_spares_the_rows_before_it() -> None:
    shape = SHAPES[0]
    layers = [make_layer(shape, torch.float32, seed) for seed in (1, 2)]
    rope = rope_table(64, shape.head_dim, 1e4, DEVICE)
    rows = on_device(ragged_rows([(0, 9)], page_table([9], 1, seeded(1))))
    clean, dirty = normal(9, shape.hidden), normal(9, shape.hidden)
    dirty[5] = torch.nan
    for x in (clean, dirty):
        decoder_stack(x, layers, [poisoned_cache(shape, 1, torch.float32) for _ in layers], rope, rows)
    assert same_bits(dirty[:5], clean[:5]) and clean.isfinite().all()
    assert dirty[5:].isnan().any(1).all()


def test_a_layer_with_a_start_for_its_projection() -> None:
    shape = SHAPES[0]
    layer, rope = make_layer(shape, torch.float32), rope_table(64, shape.head_dim, 1e4, DEVICE)
    rows = on_device(ragged_rows([(0, 4)], page_table([4], 1, seeded(1))))
    cache = poisoned_cache(shape, 1, torch.float32)
    mirror = copied(cache)
    x, start = normal(4, shape.hidden), normal(4, layer.qkv.n, seed=3)
    expected = x.clone()
    decoder_stack(x, (layer,), (cache,), rope, rows, qkv_start=start)
    reference_layer.decoder_layer(expected, layer, mirror, rope, rows, start)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_drafters_match_the_reference() -> None:
    shape, size, anchors = SHAPES[0], 5, [0, 21]
    layers = [make_layer(shape, torch.float32, seed) for seed in (1, 2)]
    rope = rope_table(64, shape.head_dim, 1e4, DEVICE)
    table = page_table([anchor + size for anchor in anchors], 8, seeded(1)).to(DEVICE)
    caches = [filled_cache(shape, anchors, table, 8, torch.float32) for _ in layers]
    block = BlockRows(torch.tensor(anchors, device=DEVICE), table, size)
    x = normal(len(anchors) * size, shape.hidden)
    expected = x.clone()
    draft_stack(x, layers, caches, rope, block)
    reference_draft.draft_stack(expected, layers, caches, rope, block)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
