"""The drafter's layers: parity with plain torch, and blocks that do not see each other."""

from __future__ import annotations

import pytest
import torch

from kernels import threads
from kernels.draft_stack import BlockRows, draft_stack
from kernels.reference.draft_stack import draft_stack as reference
from kernels.reference.pages import write_slots
from kernels.rope import rope_table
from kernels.values import PAGE, LayerCache
from tests.kernels.layers import Shape, page_table, poisoned_cache, random_layer, same_bits

SHAPES = [
    Shape(),
    Shape(hidden=80, intermediate=50, heads=3, kv_heads=1, head_dim=64),
    Shape(hidden=96, intermediate=128, heads=8, kv_heads=2, head_dim=32),
]


def filled_cache(
    shape: Shape, anchors: list[int], table: torch.Tensor, pages: int, dtype: torch.dtype = torch.float32
) -> LayerCache:
    """Random keys and values at the positions before each anchor, NaN everywhere else."""
    cache = poisoned_cache(shape, pages, dtype)
    for row, anchor in enumerate(anchors):
        for position in range(anchor):
            slot = table[row, position // PAGE] * PAGE + position % PAGE
            generator = torch.Generator().manual_seed(position)
            k, v = torch.randn(2, 1, shape.kv_heads, shape.head_dim, generator=generator)
            write_slots(cache, k, v, slot[None])
    return cache


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 7, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_match_the_reference(shape: Shape, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    # One layer in bfloat16: a second one would spread what rounding tips over.
    count = 1 if dtype == torch.bfloat16 else 2
    layers = [random_layer(shape, generator, dtype=dtype) for _ in range(count)]
    near = {"atol": 2e-2, "rtol": 2**-7} if dtype == torch.bfloat16 else {"atol": 5e-5, "rtol": 1e-4}
    rope = rope_table(96, shape.head_dim, 1e4)
    anchors = [0, 1, 16, 37, 64]
    table = page_table([anchor + size for anchor in anchors], 20, generator)
    caches = [filled_cache(shape, anchors, table, 20, dtype) for _ in layers]
    before = [(cache.k.clone(), cache.v.clone()) for cache in caches]
    block = BlockRows(torch.tensor(anchors), table, size)
    x = torch.randn(len(anchors) * size, shape.hidden, generator=generator)
    expected = x.clone()
    reference(expected, layers, caches, rope, block)
    draft_stack(x, layers, caches, rope, block)
    torch.testing.assert_close(x, expected, **near)
    for cache, (k, v) in zip(caches, before, strict=True):
        assert same_bits(cache.k, k), "a block's keys are scratch"
        assert same_bits(cache.v, v)


def test_neighbours_pages_and_threads_change_no_bit(three_threads: None) -> None:
    shape, size = SHAPES[0], 7
    generator = torch.Generator().manual_seed(9)
    layer = random_layer(shape, generator, sixteen_bit=True)
    rope = rope_table(96, shape.head_dim, 1e4)
    anchors = [5, 37, 64, 16]
    x = torch.randn(4, size, shape.hidden, generator=generator)

    def run(order: list[int], seed: int) -> torch.Tensor:
        chosen = [anchors[i] for i in order]
        table = page_table(chosen, 20, torch.Generator().manual_seed(seed))
        cache = filled_cache(shape, chosen, table, 20)
        rows = x[order].reshape(-1, shape.hidden).clone()
        draft_stack(rows, [layer], [cache], rope, BlockRows(torch.tensor(chosen), table, size))
        return rows.view(len(order), size, -1)

    together = run([0, 1, 2, 3], seed=0)
    assert same_bits(run([2, 0, 3, 1], seed=1), together[[2, 0, 3, 1]])
    threads.set_threads(1)
    for i in range(4):
        assert same_bits(run([i], seed=i), together[[i]])


def test_an_anchor_outside_is_refused() -> None:
    shape = SHAPES[0]
    layer = random_layer(shape, torch.Generator().manual_seed(0))
    rope = rope_table(64, shape.head_dim, 1e4)
    table = torch.arange(4)[None]
    for anchor, width, message in ((60, 4, "rope table"), (-1, 4, "rope table"), (57, 3, "page")):
        block = BlockRows(torch.tensor([anchor]), table[:, :width].contiguous(), 7)
        with pytest.raises(ValueError, match=message):
            draft_stack(torch.zeros(7, shape.hidden), [layer], [poisoned_cache(shape, 4)], rope, block)
