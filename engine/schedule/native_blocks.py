"""What finished rounds say of the blocks that were drafted in them, kept natively for the decisions to come."""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule.jit import native
from engine.schedule.native_certainty import class_of
from engine.schedule.native_outlook import hang

Array = np.ndarray


@native
def saw(
    slots: Array,
    survival: Array,
    verified: Array,
    accepted: Array,
    whole: Array,
    real: Array,
    curves: Array,
    classes: Array,
    class_count: Array,
    gallery: Array,
    tally: Array,
    ratios: Array,
    memory: Array,
) -> None:
    """Remember the blocks that were drafted this round, and what became of them.

    Args:
        survival: [R, L]; slots that were not drafted are expected to go on as they usually do.
        verified, accepted: [R]; 0 where the request left the round.
        ratios: [γ] how a survival usually compares with the one before it.
    """
    count, length = survival.shape
    block = curves.shape[2]
    for j in range(1, length):
        mean = 0.0
        for i in range(count):
            mean += survival[i, j] / max(survival[i, j - 1], 1e-6) / count
        ratios[j] += 0.02 * (mean - ratios[j])
    if block > 1:
        total = 0.0
        for j in range(1, block):
            total += ratios[j]
        memory[b.DECAY] = total / (block - 1)
    for i in range(count):
        slot = slots[i]
        band, kind = whole[slot, b.BAND], class_of(slot, whole, real)
        own, other = whole[slot, b.BLOCKS_SEEN] % b.BLOCKS, class_count[kind] % b.CLASS_BLOCKS
        for j in range(block):
            expected = survival[i, j] if j < length else curves[slot, own, j - 1] * ratios[j]
            curves[slot, own, j] = classes[kind, other, j] = expected
        hang(slot, band, curves[slot, own], whole, gallery, tally)
        whole[slot, b.BLOCKS_SEEN] += 1
        whole[slot, b.LAST_DRAFT] = int(memory[b.ROUND])
        class_count[kind] += 1
        if verified[i] > 0:
            checks = min(accepted[i] + 1, verified[i])
            real[slot, b.CHECKED] = 4.0 + 0.97 * (real[slot, b.CHECKED] - 4.0) + checks
            real[slot, b.KEPT] = 2.4 + 0.97 * (real[slot, b.KEPT] - 2.4) + accepted[i]
