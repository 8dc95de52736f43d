"""The arrays that decisions stand on, found by their addresses: to hand over each of them takes longer than to decide.

A desk is one array of int64: WORDS of them for each array, its address and then its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import carray, types

from engine.schedule.jit import native
from kernels.arrays import pointer_to

Array = np.ndarray

WHOLE, REAL, CURVES, CLASSES, CLASS_COUNT, GALLERY, TALLY, RATIOS, MEMORY = range(9)  # books, and the gate's memory
BASE, DRIFT, CURVE, RATES = range(9, 13)  # of the cost table
KINDS, AFFINE, MAPS, LINES, CURVATURE, FLOOR, SUMS, CHECKED, KEPT = range(13, 22)  # of confidences
ARRAYS = 22
WORDS = 5


def desk_of(arrays: Sequence[Array]) -> Array:
    """The desk of ARRAYS contiguous arrays, float64 or int64 as their readers expect; they must outlive it."""
    assert len(arrays) == ARRAYS and all(array.flags.c_contiguous for array in arrays)
    desk = np.zeros(ARRAYS * WORDS, np.int64)
    for index, array in enumerate(arrays):
        desk[index * WORDS] = array.ctypes.data
        desk[index * WORDS + 1 : index * WORDS + 1 + array.ndim] = array.shape
    return desk


_reals, _wholes = pointer_to(types.float64), pointer_to(types.int64)


@native
def wholes_at(address: int, count: int) -> Array:
    return carray(_wholes(address), (count,))


@native
def desk_at(address: int) -> Array:
    return wholes_at(address, ARRAYS * WORDS)


@native
def reals(desk: Array, index: int) -> Array:
    at = index * WORDS
    return carray(_reals(desk[at]), (desk[at + 1],))


@native
def reals2(desk: Array, index: int) -> Array:
    at = index * WORDS
    return carray(_reals(desk[at]), (desk[at + 1], desk[at + 2]))


@native
def reals3(desk: Array, index: int) -> Array:
    at = index * WORDS
    return carray(_reals(desk[at]), (desk[at + 1], desk[at + 2], desk[at + 3]))


@native
def reals4(desk: Array, index: int) -> Array:
    at = index * WORDS
    return carray(_reals(desk[at]), (desk[at + 1], desk[at + 2], desk[at + 3], desk[at + 4]))


@native
def wholes(desk: Array, index: int) -> Array:
    at = index * WORDS
    return carray(_wholes(desk[at]), (desk[at + 1],))


@native
def wholes2(desk: Array, index: int) -> Array:
    at = index * WORDS
    return carray(_wholes(desk[at]), (desk[at + 1], desk[at + 2]))
