"""How certain the target is of a request's next tokens, natively: what it says, for nothing, of drafts to come.

Where one token has most of the target's probability, the drafter guesses it more often. Requests of one band fall into
classes by it, and a request that has drafted little is judged by the blocks of its class.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost
from engine.schedule.jit import native

Array = np.ndarray

_KNOWN = 4.0  # rounds before an average is believed
_GAIN = 0.1
_EDGES = (0.45, 0.6, 0.75)  # between the classes


@native
def class_of(slot: int, whole: Array, real: Array) -> int:
    """A request's class: its band, and how certain the target has lately been of it."""
    level = 0
    if real[slot, b.CERTAIN] >= _KNOWN:
        level = 1
        for edge in _EDGES:
            level += real[slot, b.CERTAINTY] >= edge
    return whole[slot, b.BAND] * b.LEVELS + level


@native
def learn(
    slots: Array,
    certainty: Array,
    real: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
    work: Array,
    measured: Array,
    renew: bool,
    check: bool,
) -> float:
    """Take in a round: what the target was certain of, and what it took -> what it had been predicted to take.

    Args:
        slots, certainty: of the first requests of both; NaN where it is not known.
    """
    for i in range(min(slots.shape[0], certainty.shape[0])):
        own = real[slots[i]]
        if not np.isnan(certainty[i]):
            own[b.CERTAINTY] += max(_GAIN, 1.0 / (own[b.CERTAIN] + 1.0)) * (certainty[i] - own[b.CERTAINTY])
            own[b.CERTAIN] += 1.0
    return native_cost.observe(base, drift, curve, rates, work, measured, renew, check)
