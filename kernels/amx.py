"""Intel's matrix tiles (AMX): products of bfloat16 whose cost hardly grows up to sixteen rows.

A tile register holds sixteen rows of 64 bytes. One instruction multiplies up to 16 rows × 32 bfloat16 by 32 × 16 and
adds to 16 × 16 float32: the work of sixteen of AVX512-BF16's for every row. Panels of the PAIRED layout are what it
reads. Each element of the result depends on its own row and column alone, in an order that the processor fixes, so
rows stay independent of their neighbours; but the order is not that of a chain of multiply-adds, and last bits differ.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from kernels.jit import native
from kernels.processor import may_use_tiles
from kernels.simd import I64, emit_prefetch, never_inline

HAS_TILES = may_use_tiles()
TILE_ROWS = 32  # rows that share the loads of a panel: two tiles
_STEP = 32  # bfloat16 on k that one instruction multiplies
_AHEAD = 4096
_I8, _I16 = ir.IntType(8), ir.IntType(16)
# Numbers of tile registers; of the products one entry a tile of rows.
_SUMS, _FACTORS, _WEIGHTS = ((0, 1), (2, 3)), (4, 5), (6, 7)


def call_tiles(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    """An instruction on tile registers, which it takes by number."""
    function_type = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    name = f"llvm.x86.{name}"
    known = builder.module.globals.get(name)
    builder.call(known if known is not None else ir.Function(builder.module, function_type, name), arguments)


def load_tile(builder: ir.IRBuilder, tile: int, address: ir.Value, stride: ir.Value) -> None:
    call_tiles(builder, "tileloadd64", _I8(tile), bytes_at(builder, address), stride)


def store_tile(builder: ir.IRBuilder, tile: int, address: ir.Value, stride: ir.Value) -> None:
    call_tiles(builder, "tilestored64", _I8(tile), bytes_at(builder, address), stride)


def clear_tile(builder: ir.IRBuilder, tile: int) -> None:
    call_tiles(builder, "tilezero", _I8(tile))


def multiply_tile(builder: ir.IRBuilder, sums: int, factors: int, weights: int) -> None:
    call_tiles(builder, "tdpbf16ps", _I8(sums), _I8(factors), _I8(weights))


def bytes_at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _I8.as_pointer())


def emit_shapes(builder: ir.IRBuilder, shapes: list[tuple[ir.Value, int]]) -> None:
    """Shape the tile registers: rows (int64, 1 to 16) and bytes a row of each."""
    settings = cgutils.alloca_once(builder, ir.ArrayType(I64, 8))
    builder.store(ir.Constant(settings.type.pointee, [0] * 8), settings)
    base = builder.ptrtoint(settings, I64)

    def put(value: ir.Value, offset: int) -> None:
        builder.store(value, builder.inttoptr(builder.add(base, I64(offset)), value.type.as_pointer()))

    put(_I8(1), 0)  # the palette
    for tile, (rows, size) in enumerate(shapes):
        put(_I16(size), 16 + 2 * tile)
        put(builder.trunc(rows, _I8), 48 + tile)
    call_tiles(builder, "ldtilecfg", bytes_at(builder, base))


@intrinsic
def _configure(typingctx, first, second):
    """Shape the tile registers for `first` rows and as many as `second` more, each 1 to 16."""

    def lower(context, builder, sig, args):
        shapes = {tile: (I64(16), 64) for tile in _WEIGHTS}
        for tiles, factors, count in zip(_SUMS, _FACTORS, args, strict=True):
            shapes |= dict.fromkeys((*tiles, factors), (count, 64))
        emit_shapes(builder, [shapes[tile] for tile in range(8)])
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64), lower


@intrinsic
def release_tiles(typingctx):
    """Give the tile registers up: nobody saves them at a switch of threads then."""

    def lower(context, builder, sig, args):
        call_tiles(builder, "tilerelease")
        return context.get_dummy_value()

    return signature(types.void), lower


def _panel_product(blocks: int):
    """One panel times one or two tiles of rows: out [rows, 32] (+)= x wᵀ, as configured."""

    @intrinsic
    def product(typingctx, x, x_stride, w, k, out, out_stride, accumulate):
        def lower(context, builder, sig, args):
            x, x_stride, w, k, out, out_stride, accumulate = args
            sixteen_rows, sixteen_out = builder.shl(x_stride, I64(4)), builder.shl(out_stride, I64(4))
            sources = [x, builder.add(x, sixteen_rows)][:blocks]
            targets = [
                (tile, builder.add(start, I64(64 * column)))
                for start, tiles in zip([out, builder.add(out, sixteen_out)][:blocks], _SUMS, strict=False)
                for column, tile in enumerate(tiles)
            ]
            with builder.if_else(builder.icmp_signed("!=", accumulate, I64(0))) as (then, otherwise):
                with then:
                    for tile, address in targets:
                        load_tile(builder, tile, address, out_stride)
                with otherwise:
                    for tile, _ in targets:
                        clear_tile(builder, tile)
            with cgutils.for_range_slice(builder, I64(0), k, I64(_STEP), I64) as (done, _):
                weights = builder.add(w, builder.shl(done, I64(6)))
                for line in range(0, _STEP * 64, 64):
                    emit_prefetch(builder, builder.add(weights, I64(_AHEAD + line)))
                for column, tile in enumerate(_WEIGHTS):
                    load_tile(builder, tile, builder.add(weights, I64(64 * column)), I64(128))
                for source, factors, sums in zip(sources, _FACTORS, _SUMS, strict=False):
                    load_tile(builder, factors, builder.add(source, builder.shl(done, I64(1))), x_stride)
                    for tile, column in zip(sums, _WEIGHTS, strict=True):
                        multiply_tile(builder, tile, factors, column)
            for tile, address in targets:
                store_tile(builder, tile, address, out_stride)
            return context.get_dummy_value()

        return signature(types.void, *[types.int64] * 7), lower

    return product


_one_tile, _two_tiles = (_panel_product(blocks) for blocks in (1, 2))


@native
def multiply_tiles(rows, x, x_stride, w, panels, k, out, out_stride, accumulate):
    """out (+)= x wᵀ over neighbouring PAIRED panels, all of whose columns exist; k is a multiple of 32."""
    never_inline()
    if not HAS_TILES:
        return  # no matrix is packed for them then, and what follows would not compile
    for row in range(0, rows, TILE_ROWS):
        count = min(TILE_ROWS, rows - row)
        source, to = x + row * x_stride, out + row * out_stride
        _configure(min(count, 16), max(count - 16, 1))
        for panel in range(panels):
            at = w + panel * k * 64
            if count > 16:
                _two_tiles(source, x_stride, at, k, to + panel * 128, out_stride, accumulate)
            else:
                _one_tile(source, x_stride, at, k, to + panel * 128, out_stride, accumulate)
    release_tiles()
