"""Register tiles: the inner loops of every matrix product, emitted as LLVM IR.

A tile is `rows` × `vectors` accumulators that stay in registers over a loop on k. Each output element is one
chain of fused multiply-adds over k = 0, 1, …, K−1, whatever the tile's size: how rows are grouped into tiles
never changes a bit. That is where row invariance comes from, so nothing here may split a chain.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from kernels.amx import TILE_ROWS, multiply_tiles
from kernels.jit import native
from kernels.processor import has_feature
from kernels.simd import (
    F32,
    I64,
    V32,
    VI32,
    dot_pairs,
    emit_prefetch,
    fused,
    load,
    load_as,
    load_float,
    never_inline,
    spread,
    store_as,
    store_float,
    store_narrow,
    store_narrow_float,
)
from kernels.values import FULL, HALVED, PAIRED, TILED

_WIDE_REGISTERS = has_feature("avx512f")
ROWS = 8 if _WIDE_REGISTERS else 3  # rows of a tile: 16 accumulators of 32 registers, or 12 of 16 half-width ones
_VECTOR = 64  # bytes
_AHEAD = 4096

Vectors = Callable[[ir.IRBuilder, ir.Value], list[ir.Value]]  # the vectors of step k


def emit_tile(
    builder: ir.IRBuilder,
    rows: int,
    start: list[ir.Value],
    steps: ir.Value,
    x: ir.Value,
    x_stride: ir.Value,
    vectors: Vectors,
    paired: bool = False,
) -> list[ir.Value]:
    """Emit the loop over k -> the accumulators, row by row; `start` holds their first values in that order.

    x is the address of the first row, `steps` (at least 1) the length of the chain. With `paired` a step takes
    two k: x holds bfloat16, and so do the vectors, pairs of neighbours on k in each lane.
    """
    before = builder.block
    loop, done = builder.append_basic_block("tile"), builder.append_basic_block("tile.done")
    row_addresses = [builder.add(x, builder.mul(x_stride, I64(row))) for row in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    sums = [builder.phi(V32) for _ in start]
    columns = vectors(builder, k)
    offset = builder.shl(k, I64(2))
    updated = []
    for row, address in enumerate(row_addresses):
        factor = spread(builder, load_as(builder, builder.add(address, offset), F32))
        for column, values in enumerate(columns):
            multiply = dot_pairs if paired else fused
            updated.append(multiply(builder, factor, values, sums[row * len(columns) + column]))
    k_next = builder.add(k, I64(1))
    builder.cbranch(builder.icmp_signed("<", k_next, steps), loop, done)
    k.add_incoming(I64(0), before)
    k.add_incoming(k_next, loop)
    for phi, first, last in zip(sums, start, updated, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, loop)
    builder.position_at_end(done)
    return updated


def emit_cases(builder: ir.IRBuilder, count: ir.Value, largest: int, body: Callable[[int], None]) -> None:
    """Emit `body(n)` for n = 1 … largest, and a switch on `count` to the one that applies."""
    end = builder.append_basic_block("cases.end")
    switch = builder.switch(count, end)
    for case in range(1, largest + 1):
        block = builder.append_basic_block(f"case{case}")
        switch.add_case(I64(case), block)
        builder.position_at_end(block)
        body(case)
        builder.branch(end)
    builder.position_at_end(end)


def emit_start(builder: ir.IRBuilder, accumulate: ir.Value, addresses: list[ir.Value]) -> list[ir.Value]:
    """What is at the addresses where `accumulate` is not 0, else zeros."""
    entry_block = builder.block
    load_block, ready = builder.append_basic_block("start.load"), builder.append_basic_block("start")
    builder.cbranch(builder.icmp_signed("!=", accumulate, I64(0)), load_block, ready)
    builder.position_at_end(load_block)
    loaded = [load_as(builder, address, V32) for address in addresses]
    builder.branch(ready)
    builder.position_at_end(ready)
    start = []
    for value in loaded:
        phi = builder.phi(V32)
        phi.add_incoming(ir.Constant(V32, [0.0] * 16), entry_block)
        phi.add_incoming(value, load_block)
        start.append(phi)
    return start


def emit_panel(builder: ir.IRBuilder, w: ir.Value, k: ir.Value, form: int) -> list[ir.Value]:
    """The weights of step k of the panel at w, two vectors; the 16-bit ones of HALVED widen exactly, by shifting."""
    step = 64 if form == HALVED else 128
    address = builder.add(w, builder.mul(k, I64(step)))
    for line in range(0, step, 64):
        emit_prefetch(builder, builder.add(address, I64(_AHEAD + line)))
    if form != HALVED:
        return [load_as(builder, address, V32), load_as(builder, builder.add(address, I64(_VECTOR)), V32)]
    pairs = load_as(builder, address, VI32)
    low = builder.shl(pairs, ir.Constant(VI32, [16] * 16))
    high = builder.and_(pairs, ir.Constant(VI32, [-65536] * 16))
    return [builder.bitcast(low, V32), builder.bitcast(high, V32)]


def _panel_tile(form: int):
    """A tile of up to ROWS rows over one panel. Weights stream through it once: wider tiles read slower."""

    @intrinsic
    def tile(typingctx, rows, x, x_stride, w, steps, out, out_stride, accumulate):
        def lower(context, builder, sig, args):
            count, x, x_stride, w, steps, out, out_stride, accumulate = args

            def body(rows: int) -> None:
                targets = [
                    builder.add(builder.add(out, builder.mul(out_stride, I64(row))), I64(_VECTOR * column))
                    for row in range(rows)
                    for column in range(2)
                ]
                start = emit_start(builder, accumulate, targets)

                def vectors(builder: ir.IRBuilder, k: ir.Value) -> list[ir.Value]:
                    return emit_panel(builder, w, k, form)

                sums = emit_tile(builder, rows, start, steps, x, x_stride, vectors, paired=form == PAIRED)
                for value, address in zip(sums, targets, strict=True):
                    store_as(builder, value, address)

            emit_cases(builder, count, ROWS, body)
            return context.get_dummy_value()

        return signature(types.void, *[types.int64] * 8), lower

    return tile


_tile_full, _tile_half, _tile_pair = (_panel_tile(form) for form in (FULL, HALVED, PAIRED))


@native
def is_narrow(form):
    """Whether panels of this form multiply bfloat16 rows."""
    return form >= PAIRED


@native
def rows_at_once(form):
    """How many rows share the loads of a panel."""
    return TILE_ROWS if form == TILED else ROWS


@native
def _panel_bytes(form, k):
    return (k + 1) // 2 * 128 if is_narrow(form) else k * (64 if form == HALVED else 128)


@native
def _whole_panels(rows, x, x_stride, w, form, panels, k, out, out_stride, accumulate):
    """out (+)= x wᵀ over neighbouring panels, all of whose columns exist."""
    never_inline()
    if form == TILED:
        multiply_tiles(rows, x, x_stride, w, panels, k, out, out_stride, accumulate)
        return
    size = _panel_bytes(form, k)
    for panel in range(panels):
        at = w + panel * size
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            source, to = x + row * x_stride, out + row * out_stride + panel * 128
            if form == PAIRED:
                _tile_pair(count, source, x_stride, at, (k + 1) // 2, to, out_stride, accumulate)
            elif form == HALVED:
                _tile_half(count, source, x_stride, at, k, to, out_stride, accumulate)
            else:
                _tile_full(count, source, x_stride, at, k, to, out_stride, accumulate)


@native
def multiply_panels(rows, x, x_stride, w, form, columns, first, last, k, out, out_stride, accumulate, scratch):
    """out[:, 32·first : 32·last] (+)= x wᵀ for `rows` rows of length k.

    x holds float32, or bfloat16 for narrow panels (zero-padded to an even length). w is the address of panel 0
    of a matrix of `columns` columns. A last panel that sticks out over them goes through `scratch`, TILE_ROWS × 32
    floats of the caller's own.
    """
    never_inline()
    size = _panel_bytes(form, k)
    whole = min(last, columns // 32)
    if whole > first:
        at, to = w + first * size, out + first * 128
        _whole_panels(rows, x, x_stride, at, form, whole - first, k, to, out_stride, accumulate)
    if last > whole:
        inside = columns - 32 * whole
        at, to = w + whole * size, out + whole * 128
        step = rows_at_once(form)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            if accumulate:
                for i in range(count):
                    for column in range(inside):
                        value = load_float(to + (row + i) * out_stride + 4 * column)
                        store_float(scratch + i * 128 + 4 * column, value)
            _whole_panels(count, x + row * x_stride, x_stride, at, form, 1, k, scratch, 128, accumulate)
            for i in range(count):
                for column in range(inside):
                    value = load_float(scratch + i * 128 + 4 * column)
                    store_float(to + (row + i) * out_stride + 4 * column, value)


@native
def narrow_stride(k):
    """Bytes between rows of k bfloat16, on cache lines of their own."""
    return (2 * k + 65) // 64 * 64


@native
def round_rows(rows, x, x_stride, k, out):
    """Rows of k float32 to bfloat16 rows, zero-padded to an even length, `narrow_stride` bytes apart."""
    never_inline()
    for row in range(rows):
        source, to = x + row * x_stride, out + row * narrow_stride(k)
        whole = k // 16 * 16
        for column in range(0, whole, 16):
            store_narrow(to + 2 * column, load(source + 4 * column))
        for column in range(whole, k):
            store_narrow_float(to + 2 * column, load_float(source + 4 * column))
        if k % 2:
            store_narrow_float(to + 2 * k, np.float32(0.0))
