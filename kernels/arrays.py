"""Arrays at addresses, for native code that is told where things lie."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from kernels.jit import native


def pointer_to(element: Any) -> Any:
    """Native code's view of an address: a pointer to numbers of this type."""
    kind = types.CPointer(element)

    def lower(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    @intrinsic
    def pointer(_typing: Any, address: Any) -> Any:
        return kind(types.int64), lower

    return pointer


_floats, _wholes, _words, _bytes, _doubles = (
    pointer_to(element) for element in (types.float32, types.int64, types.uint32, types.uint8, types.float64)
)


@native
def floats_at(address, count):
    return carray(_floats(address), (count,))


@native
def floats2_at(address, rows, columns):
    return carray(_floats(address), (rows, columns))


@native
def floats3_at(address, blocks, rows, columns):
    return carray(_floats(address), (blocks, rows, columns))


@native
def words3_at(address, blocks, rows, columns):
    return carray(_words(address), (blocks, rows, columns))


@native
def wholes_at(address, count):
    return carray(_wholes(address), (count,))


@native
def wholes2_at(address, rows, columns):
    return carray(_wholes(address), (rows, columns))


@native
def bytes_at(address, count):
    return carray(_bytes(address), (count,))


@native
def doubles_at(address, count):
    return carray(_doubles(address), (count,))
