"""Softmax attention over pages, for native code.

Two passes: all scores of a row, their maximum, exponentials and sum; then the values. A row's keys come in
tiles of one page each, in order of position, so what happens to a row depends on its own position only. Rows of
one sequence that run side by side share each load of a page that all of them see whole, as do the heads of a group;
both only widen the register tile, which changes no chain (kernels.tiles). Slots beyond a tile's count, or before a
row's window, are never used: their scores become −inf by selection, and their values are not read (in bfloat16 the
one that shares a pair with the first of the window is, and multiplied by 0).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from kernels.amx_attention import PAGES_AHEAD as PAGES_AHEAD
from kernels.amx_attention import add_tiles, tiles_fit
from kernels.attention_tiles import ODD, add_paired_values, add_values, score
from kernels.jit import native
from kernels.simd import (
    add_lanes,
    exp,
    first_lanes,
    load,
    load_float,
    load_int,
    max_lanes,
    maximum,
    never_inline,
    splat,
    store,
    store_float,
    store_narrow,
)

GROUP_ROWS = 16  # query rows (tokens × heads of a group) that share the loads of a page


@native
def _softmax(scores, start, tiles, counts, block, limit, item):
    """Exponentials of a row's scores less their maximum, in place -> one over their sum.

    The row sees slots `start` … `limit` − 1, or in a block all of each tile's count. In bfloat16 (`item` 2) the
    exponentials fill the first half of each tile; the sum is over what they were before rounding.
    """
    never_inline()
    largest = splat(-float("inf"))
    lowest = splat(-float("inf"))
    for tile in range(start // 16, tiles):
        count = load_int(counts + 8 * tile) if block else limit - 16 * tile
        s = load(scores + 64 * tile)
        if count < 16:
            s = first_lanes(s, lowest, count)
            store(scores + 64 * tile, s)
        if start > 16 * tile:
            s = first_lanes(lowest, s, start - 16 * tile)
            store(scores + 64 * tile, s)
        largest = maximum(largest, s)
    top = splat(max_lanes(largest))
    total = splat(0.0)
    for tile in range(start // 16, tiles):
        at = scores + 64 * tile
        e = exp(load(at) - top)
        store(at, e)
        total = total + e
        if item == 2:
            count = load_int(counts + 8 * tile) if block else min(16, limit - 16 * tile)
            last = load_float(at + 4 * (count - 1))
            store_narrow(at, e)
            if count % 2:
                store_float(at + ODD, last)
    return splat(1.0) / splat(add_lanes(total))


@native
def _span(position, base, window, block, tiles):
    """The listed slots that the row at `position` sees, first and behind the last, and how many tiles hold them."""
    start, limit = 0, position + 1 - 16 * base
    if window:
        start = max(0, position + 1 - window - 16 * base)
    return start, limit, tiles if block else (limit + 15) // 16


@native
def _add_page(rows, weights, stride, v, v_next, skip, slots, head_dim, out, item):
    """Values of slots `skip` … `slots` − 1 of a page; of bfloat16 the first may lie behind one more, of weight 0."""
    if item == 2:
        add_paired_values(rows, weights, stride, v, v_next, skip // 2, slots, head_dim, out)
    else:
        v += skip * head_dim * 4
        add_values(rows, weights + 4 * skip, stride, v, v_next, slots - skip, head_dim, out)


@native
def _add_common(rows, weights, stride, v_pages, counts, first, last, head_dim, out, item):
    """Values of the tiles first … last−1, which all rows see."""
    tile = first
    while tile < last:
        end = tile
        while tiles_fit(head_dim, item) and end < last and load_int(counts + 8 * end) == 16:
            end += 1
        if end > tile:
            add_tiles(rows, weights, stride, v_pages, tile, end, head_dim, out)
            tile = end
            continue
        slots, at = load_int(counts + 8 * tile), weights + 64 * tile
        v, v_next = load_int(v_pages + 8 * tile), load_int(v_pages + 8 * (tile + PAGES_AHEAD))
        _add_page(rows, at, stride, v, v_next, 0, slots, head_dim, out, item)
        tile += 1


@native
def _add_own(group, weights, stride, v_pages, first, last, start, limit, head_dim, out, item):
    """Values of the tiles first … last−1 of one row, slots `start` … `limit` − 1 of them."""
    tile = first
    while tile < last:
        slots, skip = min(16, limit - 16 * tile), max(0, start - 16 * tile)
        if tiles_fit(head_dim, item) and slots == 16 and skip == 0:
            end = min(last, limit // 16)
            add_tiles(group, weights, stride, v_pages, tile, end, head_dim, out)
            tile = end
            continue
        v = load_int(v_pages + 8 * tile)
        _add_page(group, weights + 64 * tile, stride, v, v, skip, slots, head_dim, out, item)
        tile += 1


@native
def attend(
    tokens,
    group,
    head_dim,
    q,
    k_pages,
    v_pages,
    counts,
    tiles,
    alike,
    common,
    base,
    window,
    block,
    positions,
    scores,
    stride,
    sums,
    out,
    out_stride,
    out_item,
    item,
):
    """Attention of one key/value head: `tokens` rows of one sequence, `group` heads each.

    q [tokens, group, head_dim], scaled. `k_pages` and `v_pages` list addresses of `tiles` pages, the first of them
    the sequence's page `base`. All rows see all of `alike` … `common` − 1, and `counts` says the slots in use of those.
    Row i sees the last `window` keys up to its position, all where that is 0; in a `block` just what is common.
    Cached numbers take `item` bytes. `scores` [tokens · group, stride bytes] and `sums` [tokens · group, head_dim] are
    scratch; of a row's scores the last 64 bytes are no score's. Row i, head g goes to
    out + i · out_stride + g · head_dim · out_item, in float32 or bfloat16.
    """
    never_inline()
    rows = tokens * group
    # Pages that only some rows see are scored for all: nobody looks at what lies behind its own position.
    most = common
    for i in range(tokens):
        most = max(most, _span(load_int(positions + 8 * i), base, window, block, tiles)[2])
    score(rows, q, head_dim, k_pages, alike, most, scores, stride, item)
    for i in range(tokens):
        start, limit, own = _span(load_int(positions + 8 * i), base, window, block, tiles)
        row, query = i * group, q + i * group * head_dim * item
        if start // 16 < alike:
            last = min(alike, own)
            score(group, query, head_dim, k_pages, start // 16, last, scores + row * stride, stride, item)
        for g in range(group):
            at = scores + (row + g) * stride
            store(at + stride - 64, _softmax(at, start, own, counts, block, limit, item))
            for column in range(0, head_dim * 4, 64):
                store(sums + (row + g) * head_dim * 4 + column, splat(0.0))
        if start // 16 < alike:
            last, at = min(alike, own), sums + row * head_dim * 4
            _add_own(group, scores + row * stride, stride, v_pages, start // 16, last, start, limit, head_dim, at, item)
    _add_common(rows, scores, stride, v_pages, counts, alike, common, head_dim, sums, item)
    for i in range(tokens):
        start, limit, own = _span(load_int(positions + 8 * i), base, window, block, tiles)
        row = i * group
        if own > common:
            at = sums + row * head_dim * 4
            _add_own(group, scores + row * stride, stride, v_pages, common, own, 0, limit, head_dim, at, item)
        for g in range(group):
            to = out + i * out_stride + g * head_dim * out_item
            at, share = sums + (row + g) * head_dim * 4, load(scores + (row + g + 1) * stride - 64)
            for column in range(0, head_dim, 16):
                value = load(at + 4 * column) * share
                if out_item == 2:
                    store_narrow(to + 2 * column, value)
                else:
                    store(to + 4 * column, value)
