"""Attention over pages: parity with plain torch, masks that hold against NaN, and rows that do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.reference import pages as reference
from kernels.triton import paged_attention as device
from kernels.triton.paged_attention import block_attention, paged_attention, tile_rows
from kernels.values import BlockRows, LayerCache, Rows
from tests.kernels.layers import Shape, page_table, ragged_rows
from tests.kernels.triton.cases import DEVICE, NEAR, filled_cache, poisoned_cache, same_bits, seeded

SHAPES = [
    Shape(heads=4, kv_heads=2, head_dim=32),
    Shape(heads=3, kv_heads=1, head_dim=80),
    Shape(heads=20, kv_heads=1, head_dim=16),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits already at a hundred positions."""
    monkeypatch.setattr(device, "SPLIT", 64)


def on_device(rows: Rows) -> Rows:
    return Rows(*(getattr(rows, name).to(DEVICE) for name in ("positions", "row_sequence", "slots", "page_table")))


def attend(q: Tensor, cache: LayerCache, rows: Rows, window: int = 0) -> Tensor:
    tiles = tile_rows(rows, q.shape[1], cache.kv_heads, cache.k.dtype, q.shape[2])
    return paged_attention(q, cache, rows, tiles, window)


def ragged(shape: Shape, dtype: torch.dtype, spans: list[tuple[int, int]], seed: int = 1) -> tuple:
    table = page_table([stop for _, stop in spans], 40, seeded(seed))
    cache = filled_cache(shape, [stop for _, stop in spans], table.to(DEVICE), 40, dtype)
    rows = on_device(ragged_rows(spans, table))
    q = torch.randn(len(rows.positions), shape.heads, shape.head_dim, generator=seeded(seed)).to(DEVICE, dtype)
    return q, cache, rows


@pytest.mark.parametrize(
    ("shape", "dtype", "window"),
    [
        (SHAPES[0], torch.float32, 0),
        (SHAPES[0], torch.bfloat16, 37),
        (SHAPES[1], torch.float32, 37),
        (SHAPES[1], torch.bfloat16, 0),
        (SHAPES[2], torch.float32, 1),
    ],
    ids=str,
)
def test_ragged_rows_match_the_reference(shape: Shape, dtype: torch.dtype, window: int) -> None:
    """A prefill chunk, decoding rows, verified blocks, a page's edges."""
    spans = [(0, 9), (149, 150), (62, 66), (16, 17)]
    q, cache, rows = ragged(shape, dtype, spans[:2] if shape.heads > 4 else spans)
    out = attend(q, cache, rows, window)
    torch.testing.assert_close(out, reference.paged_attention(q, cache, rows, window), **NEAR[dtype])


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (7, torch.bfloat16), (36, torch.float32)], ids=str)
def test_blocks_match_the_reference(dtype: torch.dtype, size: int) -> None:
    shape, anchors = SHAPES[0], ([0, 64, 130] if size < 10 else [70])
    table = page_table([anchor + size for anchor in anchors], 40, seeded(2)).to(DEVICE)
    cache = filled_cache(shape, anchors, table, 40, dtype)
    block = BlockRows(torch.tensor(anchors, device=DEVICE), table, size)
    q = torch.randn(len(anchors) * size, shape.heads, shape.head_dim, generator=seeded(3)).to(DEVICE, dtype)
    k, v = torch.randn(2, len(anchors) * size, shape.kv_heads, shape.head_dim, generator=seeded(4)).to(DEVICE, dtype)
    expected = reference.block_attention(q, k, v, cache, block)
    out = block_attention(q, k, v, cache, block)
    torch.testing.assert_close(out, expected, **NEAR[dtype])


def test_rows_that_take_turns_for_a_small_workspace_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache, rows = ragged(SHAPES[0], torch.float32, [(0, 3), (190, 193), (120, 122)])
    together = [attend(q, cache, rows, window) for window in (0, 70)]
    monkeypatch.setattr(device, "WORKSPACE", 100_000)
    in_turn = [attend(q, cache, rows, window) for window in (0, 70)]
    assert all(same_bits(a, b) for a, b in zip(together, in_turn, strict=True))


def test_chunks_pages_neighbours_and_order_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SPLIT", 32)
    shape = SHAPES[0]
    q = torch.randn(50, shape.heads, shape.head_dim, generator=seeded(5)).to(DEVICE)

    def run(spans: list[tuple[int, int]], seed: int) -> Tensor:
        _, cache, rows = ragged(shape, torch.float32, spans, seed)
        return attend(q[rows.positions], cache, rows)

    whole = run([(0, 50)], 0)
    for start, stop in ((0, 3), (31, 33), (47, 50)):
        together = run([(40, 41), (start, stop)], stop)
        assert same_bits(together[1 : 1 + stop - start], whole[start:stop])
    _, cache, rows = ragged(shape, torch.float32, [(0, 4), (40, 44)])
    order = torch.randperm(8, generator=seeded(6)).to(DEVICE)
    mixed = Rows(rows.positions[order], rows.row_sequence[order], rows.slots[order], rows.page_table)
    mine = q[rows.positions]
    assert same_bits(attend(mine[order], cache, mixed), attend(mine, cache, rows)[order])


def test_pages_that_slid_out_of_the_window_may_be_gone() -> None:
    """Their slots hold NaN, and their ids in the table are −1; rows in any order."""
    window = 21
    q, cache, rows = ragged(SHAPES[0], torch.float32, [(90, 93), (37, 38)])
    order = torch.tensor([1, 0, 2, 3], device=DEVICE)
    mixed = Rows(rows.positions[order], rows.row_sequence[order], rows.slots[order], rows.page_table.clone())
    expected = reference.paged_attention(q, cache, rows, window)
    for sequence, first in ((0, 90 - window + 1), (1, 37 - window + 1)):
        whole, rest = divmod(first, 16)
        cache.v[rows.page_table[sequence, whole], :, :rest] = torch.nan
        cache.k.mT[rows.page_table[sequence, whole], :, :rest] = torch.nan
        mixed.page_table[sequence, :whole] = -(10**9)
    torch.testing.assert_close(attend(q[order], cache, mixed, window), expected[order], **NEAR[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_poisoned_slot_spares_the_rows_before_it(dtype: torch.dtype) -> None:
    """Stored as `store_kv` does it: a key of NaN, and values of 0."""
    q, cache, rows = ragged(SHAPES[0], dtype, [(90, 100)])
    clean = attend(q, cache, rows)
    at = rows.slots[4]
    cache.k.mT[at // 16, :, at % 16] = torch.nan
    cache.v[at // 16, :, at % 16] = 0
    dirty = attend(q, cache, rows)
    assert same_bits(dirty[:4], clean[:4])
    assert dirty[4:].isnan().all()


def test_no_rows_are_no_work_and_other_shapes_are_refused() -> None:
    shape = SHAPES[0]
    q, cache, rows = ragged(shape, torch.float32, [(0, 5)])
    none = Rows(rows.positions[:0], rows.row_sequence[:0], rows.slots[:0], rows.page_table)
    assert attend(q[:0], cache, none).shape == (0, shape.heads * shape.head_dim)
    with pytest.raises(ValueError, match="does not fit"):
        attend(q[:, :3], cache, rows)
    with pytest.raises(ValueError, match="does not fit"):
        attend(q[..., :8], poisoned_cache(shape, 2, torch.float32), rows)
