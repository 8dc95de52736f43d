"""Softmax attention over K/V pages: ragged rows that look back, and draft blocks that look both ways.

A program takes a tile of query rows, BLOCK_M of (tokens × heads of a group), one K/V head, and one split of the
context: SPLIT slots, counted from position 0, walked in tiles of BLOCK_N. `_merge` then joins a row's splits in order.
All sizes are fixed and a tile that a row does not see multiplies its sums by 1 and adds 0, so a row's result depends
on its own position only.

What a row does not see is masked by selection: its score becomes −inf, and slots that no row of the tile sees are not
read, so free pages may hold anything. A value that some row of the tile sees must be finite, since 0 · NaN would reach
the rows that do not: `store_kv` writes 0 in place of a head's values that are not, and NaN as its key, so that rows
which see it learn of it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import UNFUSED, dot, narrow
from kernels.values import PAGE, BlockRows, LayerCache, Rows

SPLIT = 512  # slots
WORKSPACE = 256 << 20  # bytes for the sums of splits; more rows than fit take turns
_LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which query rows make a tile: `first` [T + 1] int64 is a tile's first row, T behind the last one.

    A tile holds neighbouring rows of one sequence whose positions rise without a gap, so that each slot between the
    first and the last that it sees is seen by one of its rows. Made once a forward, without waiting for the device.
    """

    first: Tensor
    programs: int  # that share the tiles: enough for one each where every sequence's rows lie together
    tokens: int  # rows a tile holds at most
    block_m: int
    block_n: int


def tile_rows(rows: Rows, heads: int, kv_heads: int, dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of the rows of a batch, for attention over caches of `dtype`."""
    shape = (heads, kv_heads, dtype, head_dim)
    return _tile_rows(rows.row_sequence, rows.positions, rows.page_table.shape[0], *shape)


def _tile_rows(
    row_sequence: Tensor,
    positions: Tensor,
    sequences: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    head_dim: int,
) -> Tiles:
    block_m, block_n = block_shape(dtype, head_dim, heads // kv_heads)
    tokens = block_m // triton.next_power_of_2(heads // kv_heads)
    rows = len(row_sequence)
    index = torch.arange(rows, device=row_sequence.device)
    new = torch.ones_like(index, dtype=torch.bool)
    step = positions[1:] - positions[:-1]
    new[1:] = (row_sequence[1:] != row_sequence[:-1]) | (step < 0) | (step > 1)
    run = torch.where(new, index, 0).cummax(0).values
    head = (index - run) % tokens == 0
    first = torch.full((rows + 2,), rows, dtype=torch.int64, device=row_sequence.device)
    first.scatter_(0, torch.where(head, head.cumsum(0) - 1, rows + 1), index)
    programs = min(rows, triton.cdiv(rows, tokens) + sequences)
    return Tiles(first[: rows + 1], programs, tokens, block_m, block_n)


def block_shape(dtype: torch.dtype, head_dim: int, group: int) -> tuple[int, int]:
    """Query rows and slots of a tile; fixed per dtype and geometry."""
    if dtype == torch.float32:
        block_m, block_n = 16, 16
    else:
        block_m, block_n = (64, 32) if head_dim <= 256 else (16, 32)
    return max(block_m, triton.next_power_of_2(group)), block_n


def paged_attention(q: Tensor, cache: LayerCache, rows: Rows, tiles: Tiles, window: int = 0) -> Tensor:
    """Causal attention of q [T, heads, D] -> [T, heads · D]; same as `kernels.reference.pages.paged_attention`.

    Row t sees positions max(0, p − window + 1) … p of its sequence, p its own; window 0 is no window.
    """
    return _attend(q, None, None, cache, rows.page_table, rows.row_sequence, rows.positions, tiles, window, 0)


def block_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, block: BlockRows) -> Tensor:
    """Attention of draft blocks, q [R·γ, heads, D] and k, v [R·γ, kv_heads, D] -> [R·γ, heads · D].

    Same as `kernels.reference.pages.block_attention`: a slot sees the context in the cache and its whole block.
    """
    sequences, size = len(block.anchor_positions), block.block_size
    rows = torch.arange(sequences * size, device=q.device)
    owner = rows // size
    positions = block.anchor_positions[owner] - 1  # the last position of the context
    shape = (q.shape[1], k.shape[1], cache.k.dtype, q.shape[2])
    tiles = _tile_rows(owner, positions, sequences, *shape)
    return _attend(q, k, v, cache, block.page_table, owner, positions, tiles, 0, size)


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: LayerCache,
    table: Tensor,
    row_sequence: Tensor,
    positions: Tensor,
    tiles: Tiles,
    window: int,
    block: int,
) -> Tensor:
    count, heads, head_dim = q.shape
    if cache.paired:
        raise ValueError("paired caches are for native code")
    if head_dim != cache.head_dim or heads % cache.kv_heads:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache of {cache.kv_heads} heads of {cache.head_dim}")
    parts = max(1, triton.cdiv(table.shape[1] * PAGE, SPLIT)) + (1 if block else 0)
    most = max(1, WORKSPACE // (4 * parts * heads * head_dim))
    if parts > 1 and count > most:
        turns = []
        for at in range(0, count, most):
            turn = slice(at, at + most)
            owners, places = row_sequence[turn], positions[turn]
            few = _tile_rows(owners, places, len(table), heads, cache.kv_heads, cache.k.dtype, head_dim)
            turns.append(_attend(q[turn], k, v, cache, table, owners, places, few, window, block))
        return torch.cat(turns)
    out = torch.empty((count, heads * head_dim), dtype=q.dtype, device=q.device)
    if count == 0:
        return out
    q = q.contiguous()
    sums = q.new_empty((parts, count, heads, head_dim) if parts > 1 else (1,), dtype=torch.float32)
    scales = q.new_empty((parts, count, heads, 2) if parts > 1 else (1,), dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(head_dim))
    _attention[(tiles.programs, cache.kv_heads, parts)](
        q, q if k is None else k.contiguous(), q if v is None else v.contiguous(), cache.k, cache.v, out, sums, scales,
        table, row_sequence, positions, tiles.first,
        count, heads, cache.kv_heads, head_dim, table.stride(0), window, block, head_dim**-0.5 * _LOG2E,
        *cache.k.stride(), *cache.v.stride(),
        ALONE=parts == 1, BLOCK=block > 0, PAGE_SIZE=PAGE, SPLIT_SIZE=SPLIT, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, BLOCK_D=padded, TOKENS=tiles.tokens,
        num_warps=8 if tiles.block_m * padded > 8192 else 4, num_stages=2, **UNFUSED,
    )  # fmt: skip
    if parts > 1:
        _merge[(count, heads)](
            out, sums, scales, positions, count, heads, head_dim, parts - 1, window,
            BLOCK=block > 0, SPLIT_SIZE=SPLIT, BLOCK_D=padded, num_warps=1, **UNFUSED,
        )  # fmt: skip
    return out


@triton.jit
def _step(q, k, v, seen, scale, top, total, sums):
    """Online softmax: add the keys k [N, D] and values v [N, D] that `seen` [M, N] selects."""
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    scores = tl.where(seen, scores * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    sums = dot(narrow(weights, v.dtype), v, sums * keep[:, None])
    return new_top, total * keep + tl.sum(weights, 1), sums


@triton.jit
def _attention(
    q_ptr, block_k, block_v, cache_k, cache_v, out_ptr, part_sums, part_scales,
    table, row_sequence, positions, tile_first,
    count, heads, kv_heads, head_dim, table_stride, window, block, scale,
    k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
    ALONE: tl.constexpr, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tl.load(tile_first + tile)
    if BLOCK:  # the rows of a block lie together: no more tiles than programs
        if first < count:
            _tile(
                q_ptr, block_k, block_v, cache_k, cache_v, out_ptr, part_sums, part_scales,
                table, row_sequence, positions, first, tl.load(tile_first + tile + 1),
                count, heads, kv_heads, head_dim, table_stride, window, block, scale,
                k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
                ALONE, BLOCK, PAGE_SIZE, SPLIT_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, TOKENS,
            )  # fmt: skip
    else:
        while first < count:
            _tile(
                q_ptr, block_k, block_v, cache_k, cache_v, out_ptr, part_sums, part_scales,
                table, row_sequence, positions, first, tl.load(tile_first + tile + 1),
                count, heads, kv_heads, head_dim, table_stride, window, block, scale,
                k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
                ALONE, BLOCK, PAGE_SIZE, SPLIT_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, TOKENS,
            )  # fmt: skip
            tile += tl.num_programs(0)
            first = tl.load(tile_first + tl.minimum(tile, count))


@triton.jit
def _tile(
    q_ptr, block_k, block_v, cache_k, cache_v, out_ptr, part_sums, part_scales,
    table, row_sequence, positions, first, after,
    count, heads, kv_heads, head_dim, table_stride, window, block, scale,
    k_page, k_head, k_dim, k_slot, v_page, v_head, v_slot, v_dim,
    ALONE: tl.constexpr, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    kv_head, part = tl.program_id(1), tl.program_id(2)
    group = heads // kv_heads
    sequence = tl.load(row_sequence + first)
    lanes = tl.arange(0, BLOCK_M)
    token, head = first + lanes // (BLOCK_M // TOKENS), kv_head * group + lanes % (BLOCK_M // TOKENS)
    mine = (token < after) & (token - first < TOKENS) & (lanes % (BLOCK_M // TOKENS) < group)
    position = tl.load(positions + token, mine, -1).to(tl.int32)
    lowest = tl.where(mine & (window > 0), position - window + 1, 0)  # the first position that a row sees
    limit = tl.max(position, 0) + 1
    start = tl.maximum(tl.min(tl.where(mine, lowest, limit), 0), 0)
    begin = tl.maximum(part * SPLIT_SIZE, start // BLOCK_N * BLOCK_N)
    end = tl.minimum((part + 1) * SPLIT_SIZE, limit)
    own_block = BLOCK & (part == tl.num_programs(2) - 1)  # behind the context's end
    if (begin < end) | own_block:
        dims = tl.arange(0, BLOCK_D)
        wide = dims < head_dim
        at = (token * heads + head)[:, None] * head_dim + dims[None, :]
        q = tl.load(q_ptr + at, mine[:, None] & wide[None, :], 0.0).to(cache_k.dtype.element_ty)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if BLOCK:
            for own_start in range(0, tl.where(own_block, block, 0), BLOCK_N):
                own = own_start + tl.arange(0, BLOCK_N)
                own_at = ((sequence * block + own) * kv_heads + kv_head)[:, None] * head_dim + dims[None, :]
                own_inside = (own < block)[:, None] & wide[None, :]
                own_k = tl.load(block_k + own_at, own_inside, 0.0).to(q.dtype)  # what the cache would hold
                own_v = tl.load(block_v + own_at, own_inside, 0.0).to(q.dtype)
                own_seen = (own < block)[None, :] & mine[:, None]
                top, total, sums = _step(q, own_k, own_v, own_seen, scale, top, total, sums)
        for slot in range(begin, end, BLOCK_N):
            key = slot + tl.arange(0, BLOCK_N)
            inside = (key >= start) & (key < limit)
            page = tl.load(table + sequence * table_stride + key // PAGE_SIZE, inside, 0)
            load = inside[:, None] & wide[None, :]
            k_at = page * k_page + kv_head * k_head + (key % PAGE_SIZE) * k_slot
            v_at = page * v_page + kv_head * v_head + (key % PAGE_SIZE) * v_slot
            k = tl.load(cache_k + k_at[:, None] + dims[None, :] * k_dim, load, 0.0)
            v = tl.load(cache_v + v_at[:, None] + dims[None, :] * v_dim, load, 0.0)
            seen = (key[None, :] <= position[:, None]) & (key[None, :] >= lowest[:, None])
            top, total, sums = _step(q, k, v, seen, scale, top, total, sums)

        if ALONE:
            out = narrow(sums / total[:, None], out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, out, mine[:, None] & wide[None, :])
        else:
            row = (part.to(tl.int64) * count + token) * heads + head
            tl.store(part_sums + row[:, None] * head_dim + dims[None, :], sums, mine[:, None] & wide[None, :])
            tl.store(part_scales + 2 * row, top, mine)
            tl.store(part_scales + 2 * row + 1, total, mine)


@triton.jit
def _merge(
    out_ptr, part_sums, part_scales, positions, count, heads, head_dim, splits, window,
    BLOCK: tl.constexpr, SPLIT_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row and head: what its splits left, in order, then what its block left."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    dims = tl.arange(0, BLOCK_D)
    wide = dims < head_dim
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, BLOCK_D], tl.float32)
    begin = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0) // SPLIT_SIZE
    end = tl.cdiv(position + 1, SPLIT_SIZE)
    for step in range(begin, end + (1 if BLOCK else 0)):
        part = tl.where(step < end, step, splits)
        row = (part * count + token) * heads + head + tl.zeros([1], tl.int64)
        part_top, part_total = tl.load(part_scales + 2 * row), tl.load(part_scales + 2 * row + 1)
        split_sums = tl.load(part_sums + row[:, None] * head_dim + dims[None, :], wide[None, :], 0.0)
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        a, b = tl.exp2(top - base), tl.exp2(part_top - base)
        top, total, sums = new_top, total * a + part_total * b, sums * a[:, None] + split_sums * b[:, None]
    to = (token * heads + head) * head_dim + dims[None, :]
    tl.store(out_ptr + to, narrow(sums / total[:, None], out_ptr.dtype.element_ty), wide[None, :])
