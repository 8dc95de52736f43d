"""Explicit vectors and raw memory for the native kernels: Numba functions that see addresses and sixteen-lane
float32 vectors, and nothing else.

Why not arrays and LLVM's own vectoriser: the order of every addition must be ours (a row's bits may not depend
on its neighbours), and a matrix tile must stay in registers. Each function below is one LLVM instruction or a
few. Sixteen lanes are one AVX-512 register; narrower machines split them and compute the same bits.
Addresses and strides are int64 byte counts.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from kernels.jit import native
from kernels.processor import has_feature

LANES = 16
HAS_DOT = has_feature("avx512bf16")
I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
V32 = ir.VectorType(F32, LANES)
VI32 = ir.VectorType(I32, LANES)
VI16 = ir.VectorType(ir.IntType(16), LANES)


class BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


BFLOAT = BFloatType()
VBF16 = ir.VectorType(BFLOAT, LANES)
PAIRS = ir.VectorType(BFLOAT, 2 * LANES)


class VectorType(types.Type):  # type: ignore[misc]
    """Numba's view of <16 x float>."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, front_type: Any) -> None:
        super().__init__(manager, front_type, V32)


def _binary(function: Any, instruction: str) -> None:
    """Let the operator work lane by lane. No fast-math flags: LLVM may not reorder or fuse."""

    @infer_global(function)
    class _Typing(ConcreteTemplate):  # type: ignore[misc]
        cases = (signature(vector, vector, vector),)

    @lower_builtin(function, vector, vector)
    def _lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args)


_binary(operator.add, "fadd")
_binary(operator.sub, "fsub")
_binary(operator.mul, "fmul")
_binary(operator.truediv, "fdiv")


def pointer(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    return builder.inttoptr(address, pointee.as_pointer())


def load_as(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type, align: int = 4) -> ir.Value:
    return builder.load(pointer(builder, address, pointee), align=align)


def store_as(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    builder.store(value, pointer(builder, address, value.type), align=align)


def spread(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """All lanes equal to the scalar."""
    vector_type = ir.VectorType(scalar.type, LANES)
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), ir.Constant(VI32, [0] * LANES))


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    known = builder.module.globals.get(name)
    function = known if known is not None else ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


def fused(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a · b + c with one rounding."""
    return call_llvm(builder, "llvm.fma.v16f32", V32, [a, b, c])


def dot_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """c + a·b over pairs of bfloat16, each held in one float32's bits: in each lane the high product, then the low one.

    One instruction where there is AVX512-BF16; elsewhere two fused multiply-adds, whose bits are the same but for
    subnormal numbers, which the instruction takes for zero.
    """
    if HAS_DOT:
        a, b = builder.bitcast(a, PAIRS), builder.bitcast(b, PAIRS)
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", V32, [c, a, b])
    a, b = builder.bitcast(a, VI32), builder.bitcast(b, VI32)
    mask, shift = ir.Constant(VI32, [-65536] * LANES), ir.Constant(VI32, [16] * LANES)
    c = fused(builder, builder.bitcast(builder.and_(a, mask), V32), builder.bitcast(builder.and_(b, mask), V32), c)
    return fused(builder, builder.bitcast(builder.shl(a, shift), V32), builder.bitcast(builder.shl(b, shift), V32), c)


def emit_prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at the address; any address is safe."""
    target = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [target, I32(0), I32(3), I32(1)])


def widen(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The sixteen bfloat16 at the address as float32, exactly."""
    halves = builder.zext(load_as(builder, address, VI16, 2), VI32)
    return builder.bitcast(builder.shl(halves, ir.Constant(VI32, [16] * LANES)), V32)


def low_halves(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The first of each of the sixteen pairs of bfloat16 at the address, as float32."""
    return builder.bitcast(builder.shl(load_as(builder, address, VI32), ir.Constant(VI32, [16] * LANES)), V32)


def store_rounded(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Store sixteen float32 as bfloat16, rounded to nearest even; NaN stays NaN."""
    store_as(builder, _rounded(builder, value), address, 2)


def _rounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Float32, sixteen or one, as bfloat16. Without AVX512-BF16 as its bits, by integer arithmetic: LLVM would call a
    function that is not there."""
    many = value.type == V32
    if HAS_DOT:
        return builder.fptrunc(value, VBF16 if many else BFLOAT)
    whole, half = (VI32, VI16) if many else (I32, ir.IntType(16))

    def every(number: int) -> ir.Constant:
        return ir.Constant(whole, [number] * LANES if many else number)

    bits = builder.bitcast(value, whole)
    upper = builder.lshr(bits, every(16))
    to_even = builder.add(every(0x7FFF), builder.and_(upper, every(1)))
    nearest = builder.lshr(builder.add(bits, to_even), every(16))
    quiet = builder.or_(upper, every(0x40))
    number = builder.fcmp_ordered("ord", value, value)
    return builder.trunc(builder.select(number, nearest, quiet), half)


def _store_every_other(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, odd: ir.Value) -> None:
    """Store sixteen float32 as bfloat16 with gaps of two bytes, which are not touched: somebody else may write there.

    The address is that of the first of sixteen words; with `odd` the upper half of each is written.
    """
    many = ir.VectorType(ir.IntType(16), 2 * LANES)
    words = builder.zext(builder.bitcast(_rounded(builder, value), VI16), VI32)
    upper = builder.icmp_signed("!=", odd, I64(0))
    both = builder.or_(words, builder.shl(words, ir.Constant(VI32, [16] * LANES)))
    place = ir.VectorType(I1, 2 * LANES)
    mask = builder.select(upper, ir.Constant(place, [0, 1] * LANES), ir.Constant(place, [1, 0] * LANES))
    target = pointer(builder, address, many)
    arguments = [builder.bitcast(both, many), target, I32(2), mask]
    call_llvm(builder, "llvm.masked.store.v32i16.p0", ir.VoidType(), arguments)


def _one_to_one(result: Any, arguments: tuple[Any, ...], emit: Any) -> Any:
    """An intrinsic of fixed types whose body is `emit(builder, *args)`."""

    def lower(context, builder, sig, args):
        value = emit(builder, *args)
        return context.get_dummy_value() if value is None else value

    sig = signature(result, *arguments)
    typed = {
        1: lambda typingctx, a: (sig, lower),
        2: lambda typingctx, a, b: (sig, lower),
        3: lambda typingctx, a, b, c: (sig, lower),
        4: lambda typingctx, a, b, c, d: (sig, lower),
    }
    return intrinsic(typed[len(arguments)])


def _reduce(builder: ir.IRBuilder, value: ir.Value, combine: Any) -> ir.Value:
    """Fold the lanes pairwise, always in the same tree: 16 to 8 to 4 to 2 to 1."""
    width = LANES
    while width > 1:
        width //= 2
        mask_type = ir.VectorType(I32, width)
        low = builder.shuffle_vector(value, value, ir.Constant(mask_type, list(range(width))))
        high = builder.shuffle_vector(value, value, ir.Constant(mask_type, list(range(width, 2 * width))))
        value = combine(low, high)
    return builder.extract_element(value, I32(0))


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _add_power_of_two(builder: ir.IRBuilder, value: ir.Value, power_bits: ir.Value) -> ir.Value:
    """value · 2ⁿ, n being the low bits of `power_bits` (a float that had a large constant added)."""
    shifted = builder.shl(builder.bitcast(power_bits, VI32), ir.Constant(VI32, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(value, VI32), shifted), V32)


def _first_lanes(builder: ir.IRBuilder, value: ir.Value, other: ir.Value, count: ir.Value) -> ir.Value:
    """Lanes below `count` of `value`, the rest of `other`; what is not chosen may be NaN."""
    lanes = ir.Constant(VI32, list(range(LANES)))
    inside = builder.icmp_signed("<", lanes, spread(builder, builder.trunc(count, I32)))
    return builder.select(inside, value, other)


load = _one_to_one(vector, (types.int64,), lambda b, address: load_as(b, address, V32))
store = _one_to_one(types.void, (types.int64, vector), lambda b, address, v: store_as(b, v, address))
load_float = _one_to_one(types.float32, (types.int64,), lambda b, address: load_as(b, address, F32))
store_float = _one_to_one(
    types.void, (types.int64, types.float32), lambda b, address, value: store_as(b, value, address)
)
load_int = _one_to_one(types.int64, (types.int64,), lambda b, address: load_as(b, address, I64, 8))
store_int = _one_to_one(
    types.void, (types.int64, types.int64), lambda b, address, value: store_as(b, value, address, 8)
)
load_double = _one_to_one(types.float64, (types.int64,), lambda b, address: load_as(b, address, ir.DoubleType(), 8))
load_wide = _one_to_one(vector, (types.int64,), widen)
load_wide_float = _one_to_one(
    types.float32,
    (types.int64,),
    lambda b, address: b.bitcast(b.shl(b.zext(load_as(b, address, ir.IntType(16), 2), I32), I32(16)), F32),
)
load_low = _one_to_one(vector, (types.int64,), low_halves)
store_narrow = _one_to_one(types.void, (types.int64, vector), store_rounded)
store_narrow_float = _one_to_one(
    types.void,
    (types.int64, types.float32),
    lambda b, address, value: store_as(b, _rounded(b, value), address, 2),
)
store_every_other = _one_to_one(types.void, (types.int64, vector, types.int64), _store_every_other)
copy_word = _one_to_one(
    types.void, (types.int64, types.int64), lambda b, source, to: store_as(b, load_as(b, source, I32), to)
)
splat = _one_to_one(vector, (types.float32,), spread)
fma = _one_to_one(vector, (vector, vector, vector), fused)
add_lanes = _one_to_one(types.float32, (vector,), lambda b, v: _reduce(b, v, b.fadd))
first_lane = _one_to_one(types.float32, (vector,), lambda b, v: b.extract_element(v, I32(0)))
maximum = _one_to_one(vector, (vector, vector), _larger)
max_lanes = _one_to_one(types.float32, (vector,), lambda b, v: _reduce(b, v, lambda p, q: _larger(b, p, q)))
scale_by_power = _one_to_one(vector, (vector, vector), _add_power_of_two)
where_below = _one_to_one(
    vector,
    (vector, vector, vector, vector),
    lambda b, x, limit, below, otherwise: b.select(b.fcmp_ordered("<", x, limit), below, otherwise),
)
first_lanes = _one_to_one(vector, (vector, vector, types.int64), _first_lanes)


@intrinsic
def never_inline(typingctx):
    """Keep the calling function out of its callers: tiles are large, and compiling them once is enough."""

    def lower(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return signature(types.void), lower


@native
def exp(x):
    """eˣ, to 2 units in the last place; 0 below −87, infinity above 88, NaN stays NaN.

    x = n ln 2 + r with |r| ≤ ln 2 / 2; e^r by the minimax polynomial of Cephes' expf.
    """
    magic = splat(12582912.0)  # 1.5 · 2²³: adding it leaves n in the low bits of the sum
    t = fma(x, splat(1.4426950408889634), magic)
    n = t - magic
    r = fma(n, splat(-0.693359375), x)
    r = fma(n, splat(2.12194440e-4), r)
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    p = fma(p, r * r, r + splat(1.0))
    y = scale_by_power(p, t)
    y = where_below(x, splat(-87.0), splat(0.0), y)
    return where_below(splat(88.0), x, splat(float("inf")), y)
