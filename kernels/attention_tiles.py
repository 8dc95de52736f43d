"""Register tiles of attention, for native code: scores of a page's keys, and sums of its values."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from kernels.amx_attention import PAGES_AHEAD, score_tiles, tiles_fit
from kernels.jit import native
from kernels.simd import (
    I64,
    V32,
    emit_prefetch,
    fma,
    load,
    load_as,
    load_float,
    load_low,
    never_inline,
    splat,
    store,
    store_as,
)
from kernels.tiles import ROWS, emit_cases, emit_start, emit_tile

ODD = 32  # where a tile of bfloat16 weights keeps the last of an odd number in float32


def _score_tile(paired: bool, pages: int, largest: int):
    """Scores of up to `largest` query rows against all 16 slots of each of `pages` pages."""

    @intrinsic
    def tile(typingctx, rows, q, q_stride, page_addresses, steps, out, out_stride):
        def lower(context, builder, sig, args):
            count, q, q_stride, page_addresses, steps, out, out_stride = args

            def body(rows: int) -> None:
                bases = [load_as(builder, builder.add(page_addresses, I64(8 * p)), I64, 8) for p in range(pages)]
                ahead = [
                    load_as(builder, builder.add(page_addresses, I64(8 * (PAGES_AHEAD + p))), I64, 8)
                    for p in range(pages)
                ]
                zero = ir.Constant(V32, [0.0] * 16)

                def vectors(builder: ir.IRBuilder, k: ir.Value) -> list[ir.Value]:
                    offset = builder.shl(k, I64(6))
                    for base in ahead:
                        emit_prefetch(builder, builder.add(base, offset))
                    return [load_as(builder, builder.add(base, offset), V32) for base in bases]

                sums = emit_tile(builder, rows, [zero] * (rows * pages), steps, q, q_stride, vectors, paired)
                for index, value in enumerate(sums):
                    row, page = divmod(index, pages)
                    address = builder.add(out, builder.mul(out_stride, I64(row)))
                    store_as(builder, value, builder.add(address, I64(64 * page)))

            emit_cases(builder, count, largest, body)
            return context.get_dummy_value()

        return signature(types.void, *[types.int64] * 7), lower

    return tile


def _value_tile(paired: bool, columns: int, largest: int):
    """out += p v: `steps` slots of a page, or pairs of them, `columns` vectors of head_dim, up to `largest` rows."""

    @intrinsic
    def tile(typingctx, rows, p, p_stride, v, v_next, v_stride, steps, out, out_stride):
        def lower(context, builder, sig, args):
            count, p, p_stride, v, v_next, v_stride, steps, out, out_stride = args

            def body(rows: int) -> None:
                targets = [
                    builder.add(builder.add(out, builder.mul(out_stride, I64(row))), I64(64 * column))
                    for row in range(rows)
                    for column in range(columns)
                ]
                start = emit_start(builder, I64(1), targets)

                def vectors(builder: ir.IRBuilder, k: ir.Value) -> list[ir.Value]:
                    offset = builder.mul(v_stride, k)
                    for c in range(columns):
                        emit_prefetch(builder, builder.add(builder.add(v_next, offset), I64(64 * c)))
                    base = builder.add(v, offset)
                    return [load_as(builder, builder.add(base, I64(64 * c)), V32) for c in range(columns)]

                sums = emit_tile(builder, rows, start, steps, p, p_stride, vectors, paired)
                for value, address in zip(sums, targets, strict=True):
                    store_as(builder, value, address)

            emit_cases(builder, count, largest, body)
            return context.get_dummy_value()

        return signature(types.void, *[types.int64] * 9), lower

    return tile


_FEW = max(1, ROWS // 2)
_one_page, _one_narrow_page = (_score_tile(paired, pages=1, largest=ROWS) for paired in (False, True))
_two_pages, _two_narrow_pages = (_score_tile(paired, pages=2, largest=ROWS) for paired in (False, True))
_four_pages, _four_narrow_pages = (_score_tile(paired, pages=4, largest=_FEW) for paired in (False, True))
_two_columns, _two_narrow_columns = (_value_tile(paired, columns=2, largest=ROWS) for paired in (False, True))
_four_columns, _four_narrow_columns = (_value_tile(paired, columns=4, largest=_FEW) for paired in (False, True))


@native
def score(rows, q, head_dim, pages, first, last, scores, stride, item):
    """Scores of `rows` query rows against the pages first … last−1 of the address list `pages`."""
    never_inline()
    if tiles_fit(head_dim, item):
        score_tiles(rows, q, head_dim, pages, first, last, scores, stride)
        return
    q_stride = head_dim * item
    for row in range(0, rows, ROWS):
        count = min(ROWS, rows - row)
        source, to = q + row * q_stride, scores + row * stride
        page = first
        if count <= _FEW:
            while page + 4 <= last:
                if item == 2:
                    _four_narrow_pages(count, source, q_stride, pages + 8 * page, head_dim // 2, to + 64 * page, stride)
                else:
                    _four_pages(count, source, q_stride, pages + 8 * page, head_dim, to + 64 * page, stride)
                page += 4
        while page + 2 <= last:
            if item == 2:
                _two_narrow_pages(count, source, q_stride, pages + 8 * page, head_dim // 2, to + 64 * page, stride)
            else:
                _two_pages(count, source, q_stride, pages + 8 * page, head_dim, to + 64 * page, stride)
            page += 2
        if page < last:
            if item == 2:
                _one_narrow_page(count, source, q_stride, pages + 8 * page, head_dim // 2, to + 64 * page, stride)
            else:
                _one_page(count, source, q_stride, pages + 8 * page, head_dim, to + 64 * page, stride)


@native
def add_values(rows, weights, stride, v, v_next, slots, head_dim, out):
    """out [rows, head_dim] += weights [rows, slots] times the first slots of the page of values at v."""
    never_inline()
    width = head_dim * 4
    for row in range(0, rows, ROWS):
        count = min(ROWS, rows - row)
        source, to = weights + row * stride, out + row * width
        column = 0
        if count <= _FEW:
            while column + 256 <= width:
                _four_columns(count, source, stride, v + column, v_next + column, width, slots, to + column, width)
                column += 256
        while column < width:
            _two_columns(count, source, stride, v + column, v_next + column, width, slots, to + column, width)
            column += 128


@native
def add_paired_values(rows, weights, stride, v, v_next, skip, slots, head_dim, out):
    """The same with bfloat16 weights and pairs of slots, without the first `skip` pairs.

    The last of an odd number of slots is multiplied in float32.
    """
    never_inline()
    width, pairs, before = head_dim * 4, slots // 2 - skip, 4 * skip
    for row in range(0, rows, ROWS):
        count = min(ROWS, rows - row)
        source, to = weights + row * stride, out + row * width
        column = 0
        while pairs > 0 and column < width:
            at, ahead, sums = v + skip * width + column, v_next + column, to + column
            if count <= _FEW and column + 256 <= width:
                _four_narrow_columns(count, source + before, stride, at, ahead, width, pairs, sums, width)
                column += 256
            else:
                _two_narrow_columns(count, source + before, stride, at, ahead, width, pairs, sums, width)
                column += 128
        if slots % 2:
            for i in range(count):
                weight = splat(load_float(source + i * stride + ODD))
                for column in range(0, width, 64):
                    sums = to + i * width + column
                    store(sums, fma(weight, load_low(v + slots // 2 * width + column), load(sums)))
