"""What a round costs, natively: the measured table, its correction by finished rounds, and the prediction of both.

`base` [3, N + 1] holds the table's seconds by stage and whole size; `drift` [5, 17] each stage's correction in log
seconds: one for each power of two of its size, then the stage's own; its fourth row counts how often rounds of each
size were seen, fading, and the fifth is the correction of rounds with prompts beside verification's own. `curve`
[N + 1] is the corrected verification.
"""

from __future__ import annotations

import numpy as np

from engine.schedule.jit import entry, native

Array = np.ndarray

VERIFY, DRAFT, ABSORB = 0, 1, 2  # stages
SEEN, PROMPT = 3, 4  # the other rows of `drift`
SPEED = 16  # the column of a stage's own correction
WARM = 16  # and of SEEN: rounds on end in which the drafter drafted; ABSORBS where it took in rows and no more
ABSORBS = 0.5
WARMED = 2  # rounds until what it needs is in the caches again
# Of `rates`:
REQUEST_S, CONTEXT_S, ROW_CONTEXT_S, PREFILL_ROW, DRAFT_CONTEXT_S, DRAFT_SLOTS, DRAFTED_S = 0, 1, 2, 3, 4, 5, 6
# What a round runs: cost.Work's fields in order.
REQUESTS, ROWS, CONTEXT, ROW_CONTEXT, PREFILL = 0, 1, 2, 3, 4
DRAFTING, DRAFT_CONTEXT, ABSORBED, DRAFT_SHARE, CAUGHT_UP = 5, 6, 7, 8, 9
WORK = 10
# How fast a stage's speed, and its shape, follow the measured rounds: a machine's moods change the speed, and what of
# them went into the shape of the sizes that are run would make others look dear or cheap beside them.
_SPEED_GAIN, _BUCKET_GAIN = 0.08, 0.01
_FORGETTING = 0.001  # while nobody drafts, that comes to be believed as the table has it, at the speed of verifying
_CHECK_GAIN, _CLEAR = 0.35, 0.2  # of a check that was so far off, in log seconds; of others less
_RARE, _FADING = 1.0, 0.97  # at every renewal counts fade
_RETURN = 0.01
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
def drafted_s(drift: Array, rates: Array) -> float:
    """Seconds that a round with drafts takes besides, however few."""
    return rates[DRAFTED_S] * np.exp(drift[VERIFY, SPEED])


@native
def absorb_s(base: Array, drift: Array, rows: float) -> float:
    return table_s(base, ABSORB, rows) * factor(drift, ABSORB, rows) if rows > 0 else 0.0


@native
def absorbed_s(base: Array, drift: Array, work: Array) -> float:
    """What had waited is absorbed before the round's own rows, in a pass of its own."""
    return absorb_s(base, drift, work[CAUGHT_UP]) + absorb_s(base, drift, work[ABSORBED])


@native
def rows_s(curve: Array, rows: float) -> float:
    """Seconds of a pass over so many effective rows."""
    return curve[min(round(rows), curve.shape[0] - 1)]


@native
def verify_s(base: Array, drift: Array, curve: Array, rates: Array, work: Array) -> float:
    besides_s = drafted_s(drift, rates) if work[DRAFTING] > 0 else 0.0
    if work[PREFILL] > 0:
        # These take the host longer, and are the only ones of many sizes: what they take says nothing of drafted rows.
        rows = work[ROWS] + rates[PREFILL_ROW] * work[PREFILL]
        bare_s = table_s(base, VERIFY, rows) + _extra_s(rates, work)
        return besides_s + bare_s * factor(drift, PROMPT, rows) * np.exp(drift[VERIFY, SPEED])
    return besides_s + rows_s(curve, work[ROWS]) + _extra_s(rates, work) * factor(drift, VERIFY, work[ROWS])


@native
def _extra_s(rates: Array, work: Array) -> float:
    extra = rates[REQUEST_S] * work[REQUESTS] + rates[CONTEXT_S] * work[CONTEXT]
    return extra + rates[ROW_CONTEXT_S] * work[ROW_CONTEXT]


@native
def round_s(base: Array, drift: Array, curve: Array, rates: Array, work: Array) -> float:
    """Predicted seconds of a whole round."""
    seconds = verify_s(base, drift, curve, rates, work)
    seconds += draft_s(base, drift, rates, int(work[DRAFTING]), work[DRAFT_CONTEXT], work[DRAFT_SHARE])
    return seconds + absorbed_s(base, drift, work)


@entry
def predict(base: Array, drift: Array, curve: Array, rates: Array, work: Array, out: Array) -> None:
    """Predicted seconds of each stage -> out [3]."""
    out[VERIFY] = verify_s(base, drift, curve, rates, work)
    out[DRAFT] = draft_s(base, drift, rates, int(work[DRAFTING]), work[DRAFT_CONTEXT], work[DRAFT_SHARE])
    out[ABSORB] = absorbed_s(base, drift, work)


@entry
def observe(
    base: Array, drift: Array, curve: Array, rates: Array, work: Array, measured: Array, renew: bool, check: bool
) -> float:
    """Learn from a finished round's seconds by stage [3]; what the whole round had been predicted to take.

    A check was run to learn what its size takes, which no other round shows: it counts for more. What the
    drafter takes after it stood still is an upper bound of what it takes otherwise: its weights are not in the caches.
    Errors are clipped in log space, so a correction tracks the typical round, not the stalls.
    """
    expected = round_s(base, drift, curve, rates, work)
    absorbed, caught = work[ABSORBED], work[CAUGHT_UP]
    warm = drift[SEEN, WARM]
    drift[SEEN, WARM] = warm // 1 + 1 if work[DRAFTING] > 0 else ABSORBS if absorbed > 0 else 0.0
    if work[DRAFTING] > 0 and warm == 0:
        _follow_down(drift, DRAFT, work[DRAFTING], _drafts_s(base, rates, work), measured[DRAFT])
        return expected
    rows = work[ROWS] + rates[PREFILL_ROW] * work[PREFILL]
    bare_s = table_s(base, VERIFY, rows) + _extra_s(rates, work)
    verified_s = measured[VERIFY] - (drafted_s(drift, rates) if work[DRAFTING] > 0 else 0.0)
    if work[PREFILL] > 0:
        bare_s *= np.exp(drift[VERIFY, SPEED])
        _follow(drift, PROMPT, rows, bare_s, verified_s, _BUCKET_GAIN)
    else:
        gain = _BUCKET_GAIN
        if check and verified_s > 0:
            error = np.abs(np.log(verified_s / (bare_s * factor(drift, VERIFY, rows))))
            gain = max(gain, _CHECK_GAIN * min(error / _CLEAR, 1.0))
        _follow(drift, VERIFY, rows, bare_s, verified_s, gain)
    if work[DRAFTING] > 0:
        bare_s = _drafts_s(base, rates, work)
        if warm >= WARMED:
            _follow(drift, DRAFT, work[DRAFTING], bare_s, measured[DRAFT], _BUCKET_GAIN)
        else:
            _follow_down(drift, DRAFT, work[DRAFTING], bare_s, measured[DRAFT])
    if absorbed + caught > 0 and warm > 0:
        bare_s = table_s(base, ABSORB, absorbed) * (absorbed > 0) + table_s(base, ABSORB, caught) * (caught > 0)
        _follow(drift, ABSORB, max(absorbed, caught), bare_s, measured[ABSORB], _BUCKET_GAIN)
    if work[DRAFTING] == 0:
        _forget(drift, DRAFT)
        if absorbed + caught == 0:
            _forget(drift, ABSORB)
    if renew:
        _renew(base, drift, curve)
    return expected


@native
def _drafts_s(base: Array, rates: Array, work: Array) -> float:
    """What the table says of a round's blocks."""
    seconds = table_s(base, DRAFT, work[DRAFTING]) + rates[DRAFT_CONTEXT_S] * work[DRAFT_CONTEXT]
    return seconds * (1 - rates[DRAFT_SLOTS] * (1 - work[DRAFT_SHARE]))


@native
def _follow_down(drift: Array, stage: int, size: float, predicted: float, measured: float) -> None:
    """As far as it took less than was believed."""
    if measured < predicted * factor(drift, stage, size):
        _follow(drift, stage, size, predicted, measured, _BUCKET_GAIN)


@native
def _forget(drift: Array, stage: int) -> None:
    drift[stage, :SPEED] *= 1 - _FORGETTING
    drift[stage, SPEED] += _FORGETTING * (drift[VERIFY, SPEED] - drift[stage, SPEED])


@native
def _follow(drift: Array, stage: int, size: float, predicted: float, measured: float, gain: float) -> None:
    if predicted <= 0 or measured <= 0:
        return
    place = min(np.log2(max(size, 1.0)), _TOP)
    low = int(place)
    part = place - low
    known = drift[stage, SPEED] + (1 - part) * drift[stage, low] + part * drift[stage, low + 1]
    error = np.log(measured / predicted) - known
    error = min(max(error, -_LARGEST_STEP), _LARGEST_STEP)
    drift[stage, SPEED] += _SPEED_GAIN * error
    drift[stage, low] += gain * error * (1 - part)
    drift[stage, low + 1] += gain * error * part
    if stage == VERIFY:
        drift[SEEN, low] += 1 - part
        drift[SEEN, low + 1] += part


@native
def _beside(drift: Array, bucket: int) -> float:
    """The correction of the nearest size that is seen, of two as near their mean; 0 if none is.

    Most of what the table has wrong it has wrong for all sizes: were plain rounds alone corrected, more rows would come
    to look dearer than they are, and nobody would draft any more.
    """
    for away in range(1, SPEED):
        total, count = 0.0, 0
        for other in (bucket - away, bucket + away):
            if 0 <= other < SPEED and drift[SEEN, other] >= _RARE:
                total += drift[VERIFY, other]
                count += 1
        if count:
            return total / count
    return 0.0


@native
def _renew(base: Array, drift: Array, curve: Array) -> None:
    """Where the corrected seconds would fall with more rows, their mean stands, weighed by how often each was seen."""
    for bucket in range(SPEED):
        drift[SEEN, bucket] *= _FADING
    for bucket in range(SPEED):
        if drift[SEEN, bucket] < _RARE:
            drift[VERIFY, bucket] += _RETURN * (_beside(drift, bucket) - drift[VERIFY, bucket])
    count = curve.shape[0]
    weights, ends = np.empty(count), np.empty(count, np.int64)  # of pools of rows; their seconds lie in `curve`
    pools = 0
    for rows in range(count):
        place = min(np.log2(max(rows, 1.0)), _TOP)
        low = int(place)
        part = place - low
        curve[pools] = base[VERIFY, rows] * factor(drift, VERIFY, rows)
        weights[pools] = 1e-3 + (min(drift[SEEN, low], drift[SEEN, low + 1]) if part > 0 else drift[SEEN, low])
        ends[pools] = rows + 1
        pools += 1
        while pools > 1 and curve[pools - 2] > curve[pools - 1]:
            total = weights[pools - 2] + weights[pools - 1]
            curve[pools - 2] += (curve[pools - 1] - curve[pools - 2]) * weights[pools - 1] / total
            weights[pools - 2], ends[pools - 2] = total, ends[pools - 1]
            pools -= 1
    rows = count
    for pool in range(pools - 1, -1, -1):  # from the back: a pool's seconds lie before its rows
        seconds = curve[pool]
        first = ends[pool - 1] if pool else 0
        while rows > first:
            rows -= 1
            curve[rows] = seconds


@entry
def renew(base: Array, drift: Array, curve: Array) -> None:
    """The corrected curve, which never falls; what was long not seen is corrected as its neighbours are."""
    _renew(base, drift, curve)
