"""Logistic lines that follow what confidences were worth, natively; `reliability.py` says what they are."""

from __future__ import annotations

import numpy as np

from engine.schedule.jit import entry, native

Array = np.ndarray

COUNT, KEPT, G0, G1, H00, H01, H11 = 0, 1, 2, 3, 4, 5, 6  # what was observed since the last step, summed
SUMS = 7
_MEMORY = 1500.0  # observations after which an old one counts 1/e
_FLUSH = 32  # observations learned from at a time


@entry
def teach(
    bands: Array,
    logits: Array,
    verified: Array,
    accepted: Array,
    lines: Array,
    curvature: Array,
    floor: Array,
    sums: Array,
    checked: Array,
    kept: Array,
) -> None:
    """Blocks' fates: positions up to the first rejected one were checked with all before accepted.

    Args:
        bands, verified, accepted: [R]; nothing is learned where nothing was verified.
        logits: [R, L] of the handed confidences.
        lines: [bands, γ, 2] shift and slope; curvature, floor [bands, γ, 3]: (0,0), (0,1), (1,1).
        sums: [bands, γ, SUMS]; checked, kept: [bands, γ] counts of all time.
    """
    for i in range(bands.shape[0]):
        band = bands[i]
        for j in range(min(accepted[i] + 1, verified[i])):
            x, y = logits[i, j], 1.0 if j < accepted[i] else 0.0
            p = 1.0 / (1.0 + np.exp(-(lines[band, j, 0] + lines[band, j, 1] * x)))
            weight = max(p * (1 - p), 0.01)
            cell = sums[band, j]
            cell[COUNT] += 1.0
            cell[KEPT] += y
            cell[G0] += y - p
            cell[G1] += (y - p) * x
            cell[H00] += weight
            cell[H01] += weight * x
            cell[H11] += weight * x * x
    waiting = 0.0
    for band in range(sums.shape[0]):
        for j in range(sums.shape[1]):
            waiting += sums[band, j, COUNT]
    if waiting >= _FLUSH:
        for band in range(sums.shape[0]):
            for j in range(sums.shape[1]):
                if sums[band, j, COUNT] > 0:
                    _step(lines[band, j], curvature[band, j], floor[band, j], sums[band, j])
                    checked[band, j] += int(sums[band, j, COUNT])
                    kept[band, j] += int(sums[band, j, KEPT])
                    sums[band, j, :] = 0.0


@native
def _step(line: Array, curvature: Array, floor: Array, cell: Array) -> None:
    """One Newton step on the logistic loss."""
    fade = np.exp(-cell[COUNT] / _MEMORY)
    for k in range(3):
        curvature[k] = curvature[k] * fade + cell[H00 + k]
    a, b, c = curvature[0] + floor[0], curvature[1] + floor[1], curvature[2] + floor[2]
    det = a * c - b * b
    shift = (c * cell[G0] - b * cell[G1]) / det
    slope = (a * cell[G1] - b * cell[G0]) / det
    line[0] = min(max(line[0] + min(max(shift, -0.5), 0.5), -6.0), 6.0)
    line[1] = min(max(line[1] + min(max(slope, -0.5), 0.5), 0.05), 3.0)
