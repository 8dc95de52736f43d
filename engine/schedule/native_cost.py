"""What a round costs, natively: the measured table, its correction by finished rounds, and the prediction of both.

`base` [3, N + 1] holds the table's seconds by stage and whole size; `drift` [4, 17] each stage's correction in log
seconds: one for each power of two of its size, then the stage's own; the last row counts the rounds for which
the verification of each size was not seen, fading as it is. `curve` [N + 1] is the corrected verification.
"""

from __future__ import annotations

import numpy as np

from engine.schedule.jit import entry, native

Array = np.ndarray

VERIFY, DRAFT, ABSORB = 0, 1, 2  # stages
UNSEEN = 3  # the last row of `drift`
SPEED = 16  # the column of a stage's own correction
REQUEST_S, CONTEXT_S, ROW_CONTEXT_S, PREFILL_ROW, DRAFT_CONTEXT_S, DRAFT_SLOTS = 0, 1, 2, 3, 4, 5  # of `rates`
# What a round runs: cost.Work's fields in order.
REQUESTS, ROWS, CONTEXT, ROW_CONTEXT, PREFILL = 0, 1, 2, 3, 4
DRAFTING, DRAFT_CONTEXT, ABSORBED, DRAFT_SHARE = 5, 6, 7, 8
WORK = 9
_SPEED_GAIN, _BUCKET_GAIN = 0.08, 0.03  # how fast a stage's speed, and its shape, follow the measured rounds
_OLD, _OLD_GAIN = 64.0, 0.2  # after so many rounds without it, a size's own correction moves by so much more at once
_LARGEST_STEP = 0.3  # in log seconds: a stall of a second counts as much as a round 35 % too slow
_TOP = 14.999  # the largest size that has a correction of its own, as a power of two


@native
def table_s(base: Array, stage: int, size: float) -> float:
    """Linear between whole sizes; beyond the last one its slope goes on."""
    last = base.shape[1] - 1
    low = min(int(size), last - 1)
    return base[stage, low] + (size - low) * (base[stage, low + 1] - base[stage, low])


@native
def factor(drift: Array, stage: int, size: float) -> float:
    place = min(np.log2(max(size, 1.0)), _TOP)
    low = int(place)
    part = place - low
    return np.exp(drift[stage, SPEED] + (1 - part) * drift[stage, low] + part * drift[stage, low + 1])


@native
def draft_s(base: Array, drift: Array, rates: Array, blocks: int, context: float, share: float) -> float:
    """Seconds that drafting adds, where `share` of each block's slots are drafted."""
    if blocks == 0:
        return 0.0
    seconds = table_s(base, DRAFT, blocks) + rates[DRAFT_CONTEXT_S] * context
    return seconds * factor(drift, DRAFT, blocks) * (1 - rates[DRAFT_SLOTS] * (1 - share))


@native
def absorb_s(base: Array, drift: Array, rows: float) -> float:
    return table_s(base, ABSORB, rows) * factor(drift, ABSORB, rows) if rows > 0 else 0.0


@native
def rows_s(curve: Array, rows: float) -> float:
    """Seconds of a pass over so many effective rows."""
    return curve[min(round(rows), curve.shape[0] - 1)]


@native
def verify_s(base: Array, drift: Array, curve: Array, rates: Array, work: Array) -> float:
    rows = work[ROWS] + rates[PREFILL_ROW] * work[PREFILL]
    return rows_s(curve, rows) + _extra_s(rates, work) * factor(drift, VERIFY, rows)


@native
def _extra_s(rates: Array, work: Array) -> float:
    extra = rates[REQUEST_S] * work[REQUESTS] + rates[CONTEXT_S] * work[CONTEXT]
    return extra + rates[ROW_CONTEXT_S] * work[ROW_CONTEXT]


@native
def round_s(base: Array, drift: Array, curve: Array, rates: Array, work: Array) -> float:
    """Predicted seconds of a whole round."""
    seconds = verify_s(base, drift, curve, rates, work)
    seconds += draft_s(base, drift, rates, int(work[DRAFTING]), work[DRAFT_CONTEXT], work[DRAFT_SHARE])
    return seconds + absorb_s(base, drift, work[ABSORBED])


@entry
def predict(base: Array, drift: Array, curve: Array, rates: Array, work: Array, out: Array) -> None:
    """Predicted seconds of each stage -> out [3]."""
    out[VERIFY] = verify_s(base, drift, curve, rates, work)
    out[DRAFT] = draft_s(base, drift, rates, int(work[DRAFTING]), work[DRAFT_CONTEXT], work[DRAFT_SHARE])
    out[ABSORB] = absorb_s(base, drift, work[ABSORBED])


@entry
def observe(base: Array, drift: Array, curve: Array, rates: Array, work: Array, measured: Array, renew: bool) -> float:
    """Learn from a finished round's seconds by stage [3]; what the whole round had been predicted to take.

    Errors are clipped in log space, so a correction tracks the typical round, not the stalls.
    """
    expected = round_s(base, drift, curve, rates, work)
    drift[UNSEEN] += 1
    rows = work[ROWS] + rates[PREFILL_ROW] * work[PREFILL]
    _follow(drift, VERIFY, rows, table_s(base, VERIFY, rows) + _extra_s(rates, work), measured[VERIFY])
    if work[DRAFTING] > 0:
        drafted = table_s(base, DRAFT, work[DRAFTING]) + rates[DRAFT_CONTEXT_S] * work[DRAFT_CONTEXT]
        drafted *= 1 - rates[DRAFT_SLOTS] * (1 - work[DRAFT_SHARE])
        _follow(drift, DRAFT, work[DRAFTING], drafted, measured[DRAFT])
    if work[ABSORBED] > 0:
        _follow(drift, ABSORB, work[ABSORBED], table_s(base, ABSORB, work[ABSORBED]), measured[ABSORB])
    if renew:
        _renew(base, drift, curve)
    return expected


@native
def _follow(drift: Array, stage: int, size: float, predicted: float, measured: float) -> None:
    if predicted <= 0 or measured <= 0:
        return
    place = min(np.log2(max(size, 1.0)), _TOP)
    low = int(place)
    part = place - low
    known = drift[stage, SPEED] + (1 - part) * drift[stage, low] + part * drift[stage, low + 1]
    error = np.log(measured / predicted) - known
    error = min(max(error, -_LARGEST_STEP), _LARGEST_STEP)
    # What the stage's speed learned from other sizes meanwhile may not hold for one that nobody ran.
    for bucket, share in ((low, 1 - part), (low + 1, part)):
        gain = _BUCKET_GAIN
        if stage == VERIFY:
            gain += _OLD_GAIN * min(drift[UNSEEN, bucket] / _OLD, 1.0)
            drift[UNSEEN, bucket] *= 1 - share / 2
        drift[stage, bucket] += gain * error * share
    drift[stage, SPEED] += _SPEED_GAIN * error


@native
def _renew(base: Array, drift: Array, curve: Array) -> None:
    highest = 0.0
    for rows in range(curve.shape[0]):
        highest = max(highest, base[VERIFY, rows] * factor(drift, VERIFY, rows))
        curve[rows] = highest


@entry
def renew(base: Array, drift: Array, curve: Array) -> None:
    """The corrected curve, which never falls."""
    _renew(base, drift, curve)
