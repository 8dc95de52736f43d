"""Attention on matrix tiles (kernels.amx): the scores of whole pages, and the sums of values of pages in full use.

A page of paired keys is head_dim / 32 tiles of 16 pairs × 16 slots, a page of paired values head_dim / 16 tiles of
8 pairs of slots × 16 columns. Whether a row's page goes through here depends on the row's position alone.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from kernels.amx import (
    HAS_TILES,
    clear_tile,
    emit_shapes,
    load_tile,
    multiply_tile,
    release_tiles,
    store_tile,
)
from kernels.jit import native
from kernels.simd import I64, emit_prefetch, load_as, never_inline

PAGES_AHEAD = 8  # between a page in use and the one being prefetched: memory answers late, pages pass quickly
_AT_ONCE = 4  # pages of scores, or sixteen columns of values: tile registers 0 to 3
_QUERIES, _SHARES, _KEYS, _VALUES = 4, 5, 6, 7


@native
def tiles_fit(head_dim, item):
    """Whether heads of this width, cached numbers of so many bytes each, go through here."""
    return HAS_TILES and item == 2 and head_dim % 64 == 0


@intrinsic
def _configure(typingctx, rows):
    """Shape the tile registers for so many query rows, 1 to 16."""

    def lower(context, builder, sig, args):
        sums = [(args[0], 64)] * _AT_ONCE
        emit_shapes(builder, [*sums, (args[0], 64), (args[0], 32), (I64(16), 64), (I64(8), 64)])
        return context.get_dummy_value()

    return signature(types.void, types.int64), lower


def _scores(pages: int):
    @intrinsic
    def product(typingctx, q, q_stride, addresses, out, out_stride):
        """Scores against all slots of `pages` pages; q_stride is the size of a query, 64 bytes for each tile of it."""

        def lower(context, builder, sig, args):
            q, q_stride, addresses, out, out_stride = args
            places = [builder.add(addresses, I64(8 * page)) for page in range(pages)]
            bases = [load_as(builder, place, I64, 8) for place in places]
            ahead = [load_as(builder, builder.add(place, I64(8 * PAGES_AHEAD)), I64, 8) for place in places]
            for page in range(pages):
                clear_tile(builder, page)
            with cgutils.for_range_slice(builder, I64(0), q_stride, I64(64), I64) as (done, _):
                load_tile(builder, _QUERIES, builder.add(q, done), q_stride)
                offset = builder.shl(done, I64(4))
                for page in range(pages):
                    for line in range(0, 1024, 64):
                        emit_prefetch(builder, builder.add(builder.add(ahead[page], offset), I64(line)))
                    load_tile(builder, _KEYS, builder.add(bases[page], offset), I64(64))
                    multiply_tile(builder, page, _QUERIES, _KEYS)
            for page in range(pages):
                store_tile(builder, page, builder.add(out, I64(64 * page)), out_stride)
            return context.get_dummy_value()

        return signature(types.void, *[types.int64] * 5), lower

    return product


_one_page, _four_pages = _scores(1), _scores(_AT_ONCE)


@native
def score_tiles(rows, q, head_dim, pages, first, last, scores, stride):
    """Scores of `rows` query rows against the pages first … last−1 of the address list `pages`."""
    never_inline()
    if not HAS_TILES or first >= last:
        return
    for row in range(0, rows, 16):
        source, to, page = q + row * head_dim * 2, scores + row * stride, first
        _configure(min(16, rows - row))
        while page + _AT_ONCE <= last:
            _four_pages(source, head_dim * 2, pages + 8 * page, to + 64 * page, stride)
            page += _AT_ONCE
        while page < last:
            _one_page(source, head_dim * 2, pages + 8 * page, to + 64 * page, stride)
            page += 1
    release_tiles()


@intrinsic
def _values(typingctx, weights, stride, addresses, pages, column, v_stride, out, out_stride):
    """out [rows, 64 columns] += weights times the values of `pages` whole pages, `column` bytes into each slot's."""

    def lower(context, builder, sig, args):
        weights, stride, addresses, pages, column, v_stride, out, out_stride = args
        for tile in range(_AT_ONCE):
            load_tile(builder, tile, builder.add(out, I64(64 * tile)), out_stride)
        with cgutils.for_range(builder, pages, intp=I64) as loop:
            place = builder.add(addresses, builder.shl(loop.index, I64(3)))
            base = builder.add(load_as(builder, place, I64, 8), column)
            ahead = builder.add(load_as(builder, builder.add(place, I64(8 * PAGES_AHEAD)), I64, 8), column)
            load_tile(builder, _SHARES, builder.add(weights, builder.shl(loop.index, I64(6))), stride)
            for tile in range(_AT_ONCE):
                for pair in range(8):
                    line = builder.add(ahead, builder.mul(v_stride, I64(pair)))
                    emit_prefetch(builder, builder.add(line, I64(64 * tile)))
                load_tile(builder, _VALUES, builder.add(base, I64(64 * tile)), v_stride)
                multiply_tile(builder, tile, _SHARES, _VALUES)
        for tile in range(_AT_ONCE):
            store_tile(builder, tile, builder.add(out, I64(64 * tile)), out_stride)
        return context.get_dummy_value()

    return signature(types.void, *[types.int64] * 8), lower


@native
def add_tiles(rows, weights, stride, pages, first, last, head_dim, out):
    """out [rows, head_dim] += weights, of sixteen bfloat16 a page, times the values of whole pages first … last−1."""
    never_inline()
    if not HAS_TILES or first >= last:
        return
    width = head_dim * 4
    for row in range(0, rows, 16):
        source, to = weights + row * stride + 64 * first, out + row * width
        _configure(min(16, rows - row))
        for column in range(0, width, 64 * _AT_ONCE):
            _values(source, stride, pages + 8 * first, last - first, column, width, to + column, width)
    release_tiles()
