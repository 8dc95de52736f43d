"""A round's numbers in one block of memory: what is decided and learned of it costs two objects, not twenty.

A sheet is of those that decode: the round's work (`native_cost`), then one column after the other. Another is of the
blocks that were drafted. Words of eight bytes, whole or real.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_cost as c
from engine.schedule.jit import native
from kernels.arrays import doubles_at, floats2_at, wholes_at

Array = np.ndarray

HEAD = c.WORK  # words before the columns
SLOT, CONTEXT, BEHIND, LIMIT, SITTING, WEIGHT = range(6)  # of those that decode; the weight is real
COLUMNS = 6
# Of blocks: `SLOT` and `CONTEXT`, too, then these; behind them the curves, real, [3, D, L].
BLOCK_LIMIT, LENGTH, KEPT = 2, 3, 4
BLOCK_COLUMNS = 5
CONDITIONAL, LOGIT, SURVIVAL = range(3)
WORD = 8  # bytes


@native
def whole_column(sheet: int, count: int, column: int) -> Array:
    return wholes_at(sheet + WORD * (HEAD + column * count), count)


@native
def real_column(sheet: int, count: int, column: int) -> Array:
    return doubles_at(sheet + WORD * (HEAD + column * count), count)


@native
def work_of(sheet: int) -> Array:
    return doubles_at(sheet, c.WORK)


@native
def block_column(blocks: int, count: int, column: int) -> Array:
    return wholes_at(blocks + WORD * column * count, count)


@native
def curves_of(blocks: int, count: int, length: int) -> Array:
    """[3, D, L]."""
    at = blocks + WORD * BLOCK_COLUMNS * count
    return doubles_at(at, 3 * count * length).reshape(3, count, length)


@native
def confidences_at(address: int, count: int, length: int) -> Array:
    """[D, L] float32; [0, L] where there are none."""
    return floats2_at(address, count if address else 0, length)
