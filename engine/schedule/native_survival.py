"""From confidences to survivals, natively: calibrated, corrected by past rounds, multiplied from left to right.

Does what `calibrate.py` and `Reliability.correct` do, which say why; tests hold the two against each other.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import native

Array = np.ndarray

_EDGE, _CALIBRATED_EDGE = 1e-4, 1e-6


@native
def survivals(
    confidence: Array,
    slots: Array,
    contexts: Array,
    limits: Array,
    everybodys: Array,
    prefill: int,
    whole: Array,
    real: Array,
    kinds: Array,
    affine: Array,
    maps: Array,
    lines: Array,
    conditional: Array,
    logits: Array,
    survival: Array,
    work: Array,
) -> None:
    """Calibrated conditionals, their logits, and corrected cumulative survivals, each [R, L]; and the round with ℓ = 0.

    Args:
        slots, contexts, limits: [R] of the blocks; limits are cut to L.
        everybodys, prefill: contexts of all that decode, and prompt rows.
        confidence: [R, L] as the head gave it; [0, L] without one: the share lately kept stands in.
        kinds, affine, maps: calibrations; 0 nothing, 1 (slope, offset) [·, 2, γ], 2 knots and values [·, 1 + γ, K].
        lines: [bands, γ, 2] live shift and slope.
        work: filled.
    """
    work[c.REQUESTS] = work[c.ROWS] = everybodys.shape[0]
    work[c.CONTEXT] = everybodys.sum()
    work[c.ROW_CONTEXT] = work[c.CAUGHT_UP] = 0.0
    work[c.PREFILL] = prefill
    work[c.DRAFTING] = work[c.ABSORBED] = slots.shape[0]
    work[c.DRAFT_CONTEXT] = contexts.sum()
    work[c.DRAFT_SHARE] = survival.shape[1] / lines.shape[1]
    for i in range(slots.shape[0]):
        limits[i] = min(limits[i], survival.shape[1])
    for i in range(slots.shape[0]):
        slot = slots[i]
        method, band = whole[slot, b.METHOD], whole[slot, b.BAND]
        before = running = 1.0
        for j in range(survival.shape[1]):
            given = np.float64(confidence[i, j]) if confidence.shape[0] else real[slot, b.KEPT] / real[slot, b.CHECKED]
            if method >= 0 and kinds[method] == 1:
                inner = min(max(given, _CALIBRATED_EDGE), 1 - _CALIBRATED_EDGE)
                given = 1.0 / (
                    1.0 + np.exp(-(affine[method, 0, j] * np.log(inner / (1.0 - inner)) + affine[method, 1, j]))
                )
            elif method >= 0 and kinds[method] == 2:
                below = max(before, _CALIBRATED_EDGE)
                before = min(_along(maps[method, 0], maps[method, 1 + j], before * given), before)
                given = min(before / below, 1.0)
            conditional[i, j] = given
            p = min(max(given, _EDGE), 1 - _EDGE)
            logits[i, j] = np.log(p / (1 - p))
            running *= 1.0 / (1.0 + np.exp(-(lines[band, j, 0] + lines[band, j, 1] * logits[i, j])))
            survival[i, j] = running


@native
def _along(knots: Array, values: Array, x: float) -> float:
    """Linear between knots, flat outside; unused knots are infinite."""
    low, high = 0, knots.shape[0]
    while low < high:
        middle = (low + high) // 2
        if knots[middle] <= x:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return values[0]
    if low == knots.shape[0] or knots[low] == np.inf:
        return values[low - 1]
    part = (x - knots[low - 1]) / (knots[low] - knots[low - 1])
    return values[low - 1] + part * (values[low] - values[low - 1])
