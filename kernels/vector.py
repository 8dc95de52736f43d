"""Numba helpers shared by the sampling kernels: bit casts, exp, row reductions, and drawing by inverse CDF.

Scalar loops that LLVM turns into vector code, the same code for every row: a row's result never depends on another row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.jit import native

# Like `native`, with more freedom for LLVM; NaN and infinity keep their meaning.
relaxed = numba.njit(error_model="numpy", nogil=True, fastmath={"reassoc", "contract", "nsz"})
"""Sums in vector order, fused multiply-add."""
fused = numba.njit(error_model="numpy", nogil=True, fastmath={"contract"})
"""Fused multiply-add only."""


def _bitcast(llvm_type: ir.Type) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvm_type)

    return generate


@intrinsic  # type: ignore[untyped-decorator]
def float_bits(typing_context: Any, x: Any) -> Any:
    """The bits of a float32 as int32."""
    return types.int32(types.float32), _bitcast(ir.IntType(32))


@intrinsic  # type: ignore[untyped-decorator]
def bits_float(typing_context: Any, x: Any) -> Any:
    """The float32 with these int32 bits."""
    return types.float32(types.int32), _bitcast(ir.FloatType())


_LOG2E, _ROUND = np.float32(1.44269504), np.float32(12582912.0)  # adding 1.5 · 2²³ rounds to an integer
_ROUND_BITS, _BIAS, _SHIFT = np.int32(0x4B400000), np.int32(127), np.int32(23)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_FLOOR, _ONE = np.float32(-88.0), np.float32(1.0)
_E0, _E1, _E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_E3, _E4, _E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_LOWEST, _31 = np.int32(-0x80000000), np.int32(31)


@fused
def exp_float32(x: np.float32) -> np.float32:
    """exp(x) for x ≤ 88 within 2 units in the last place; exactly 0 below −88, so −inf has no weight."""
    y = _FLOOR if x < _FLOOR else x
    shifted = y * _LOG2E + _ROUND
    n = shifted - _ROUND
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    scale = bits_float(np.int32(np.int32(float_bits(shifted) - _ROUND_BITS + _BIAS) << _SHIFT))
    return (p * (r * r) + r + _ONE) * scale


@native
def ordered(x: np.float32) -> np.int32:
    """An int32 that compares like the float: integer maxima vectorise without assuming away NaN."""
    bits = float_bits(x)
    return np.int32(bits ^ ((bits >> _31) & _MAGNITUDE))


@native
def row_maximum(row: np.ndarray) -> np.float32:
    """The largest element of a float32 row, or NaN if it holds one."""
    top, magnitude = _LOWEST, np.int32(0)
    for v in range(row.shape[0]):
        bits = float_bits(row[v])
        key = np.int32(bits ^ ((bits >> _31) & _MAGNITUDE))
        top = max(top, key)
        magnitude = max(magnitude, np.int32(bits & _MAGNITUDE))
    if magnitude > _INFINITY:
        return np.float32(np.nan)
    return bits_float(np.int32(top ^ ((top >> _31) & _MAGNITUDE)))


@native
def first_index(row: np.ndarray, value: np.float32) -> int:
    """The lowest index that holds `value`; 0 if none does."""
    for start in range(0, row.shape[0], 64):
        part = row[start : start + 64]
        hits = 0
        for v in range(part.shape[0]):
            hits += part[v] == value
        if hits:
            for v in range(part.shape[0]):
                if part[v] == value:
                    return start + v
    return 0


@relaxed
def total_weight(weights: np.ndarray) -> float:
    """The float64 sum of a float32 row."""
    total = 0.0
    for v in range(weights.shape[0]):
        total += np.float64(weights[v])
    return total


@fused
def exp_row(row: np.ndarray, weights: np.ndarray) -> float:
    """weights = exp(row), both float32; returns their float64 sum."""
    for v in range(row.shape[0]):
        weights[v] = exp_float32(row[v])
    return total_weight(weights[: row.shape[0]])


MASS = 256  # weights that are added up together, for `draw_by_mass`


@fused
def scaled_exp_row(
    row: np.ndarray, top: np.float32, temperature: np.float32, weights: np.ndarray, masses: np.ndarray
) -> float:
    """row = (row − top) / temperature in place, weights = exp(row) -> their float64 sum.

    masses float64 [⌈V / MASS⌉] become the sums of MASS weights each.
    """
    total = 0.0
    for part in range(masses.shape[0]):
        # Slices counted from 0, and sums apart: LLVM makes no vectors of an index that it takes for negative perhaps,
        # nor of float32 and float64 in one loop as good ones; that took nine times as long.
        start = part * MASS
        values, weighed = row[start : start + MASS], weights[start : start + MASS]
        if temperature == _ONE:  # the same bits without dividing
            for v in range(values.shape[0]):
                x = values[v] - top
                values[v] = x
                weighed[v] = exp_float32(x)
        else:
            for v in range(values.shape[0]):
                x = (values[v] - top) / temperature
                values[v] = x
                weighed[v] = exp_float32(x)
        mass = total_weight(weighed)
        masses[part] = mass
        total += mass
    return total


@native
def _first_beyond(weights: np.ndarray, start: int, below: float, target: float) -> int:
    """The token among the MASS from `start` on at which the cumulative weight, `below` before them, passes the target;
    where rounding forbids it the last of them with weight."""
    token = start
    for v in range(start, min(weights.shape[0], start + MASS)):
        if weights[v] > 0.0:
            token = v
            below += np.float64(weights[v])
            if below > target:
                break
    return token


@native
def _last_possible(weights: np.ndarray) -> int:
    """The last token with weight, where rounding put the target at the very end; 0 if none has."""
    for v in range(weights.shape[0] - 1, -1, -1):
        if weights[v] > 0.0:
            return v
    return 0


@native
def draw_by_mass(weights: np.ndarray, masses: np.ndarray, total: float, u: float) -> int:
    """`draw` by the sums that `scaled_exp_row` leaves."""
    target = u * total
    below = 0.0
    for part in range(masses.shape[0]):
        mass = masses[part]
        if mass > 0.0 and below + mass > target:
            return _first_beyond(weights, part * MASS, below, target)
        below += mass
    return _last_possible(weights)


@native
def draw(weights: np.ndarray, u: float) -> int:
    """Inverse CDF over float32 weights: the first token whose cumulative weight exceeds u · total.

    Never a token of weight 0.
    """
    target = u * total_weight(weights)
    below = 0.0
    for start in range(0, weights.shape[0], MASS):
        mass = total_weight(weights[start : start + MASS])
        if mass > 0.0 and below + mass > target:
            return _first_beyond(weights, start, below, target)
        below += mass
    return _last_possible(weights)
