"""How much of each block to verify, natively: survivals in, lengths out, in one call.

Decides exactly as the readable versions do (`lengths.py`, `policies.py`), which say why; tests hold the two against
each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import native
from engine.schedule.native_heap import pop, push, sink

Array = np.ndarray

STATIC, CAUSAL, PRICED, RELAYED = 0, 1, 2, 3  # rules
_FREE = 4  # PRICED's second walk
LOOK = 16  # rows that a search looks past a candidate that does not pay
NOBODY, EVERYTHING, NO_GAIN, BUDGET, RULE = 0, 1, 2, 3, 4  # why it stopped: record.Stop in order


@native
def choose(
    rule: int,
    mode: int,
    draft_tokens: int,
    threshold: float,
    conditional: Array,
    survival: Array,
    slots: Array,
    limits: Array,
    contexts: Array,
    whole: Array,
    real: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
    work: Array,
    tokens: float,
    price: float,
    decay: float,
    past: Array,
    past_blocks: int,
    gains: Array,
    lengths: Array,
) -> int:
    """Verified lengths [R] -> why it stopped.

    Args:
        mode, draft_tokens (−1: all), threshold: of requests that leave the choice under STATIC, and defaults.
        work: the round with ℓ = 0; changed.
        past, past_blocks: RELAYED's older gains, and the blocks they came from; 0 for none yet.
        gains: [R · L] RELAYED's gains of now, falling; NaN beyond.
    """
    count = slots.shape[0]
    ours = np.zeros(count, np.bool_)
    row_s = np.zeros(count)
    per_token = rates[c.ROW_CONTEXT_S] * np.exp(drift[c.VERIFY, c.SPEED])
    own_s, asked, most, shared = 0.0, 0, 0, 0
    for i in range(count):
        slot = slots[i]
        wish = whole[slot, b.MODE]
        most += limits[i]
        row_s[i] = per_token * contexts[i]
        lengths[i] = 0
        if wish == b.AUTO and rule != STATIC:
            ours[i] = True
            shared += 1
            continue
        wish = mode if wish == b.AUTO else wish
        if wish == b.FIXED:
            wanted = whole[slot, b.TOKENS] if whole[slot, b.TOKENS] >= 0 else draft_tokens
            lengths[i] = limits[i] if wanted < 0 else min(limits[i], wanted)
        else:
            edge = threshold if np.isnan(real[slot, b.THRESHOLD]) else real[slot, b.THRESHOLD]
            lengths[i] = limits[i]
            for k in range(limits[i]):
                if conditional[i, k] < edge:
                    lengths[i] = k
                    break
        asked += lengths[i]
        own_s += lengths[i] * row_s[i]
        brought = 0.0
        for k in range(lengths[i]):
            brought += survival[i, k]
        tokens += real[slot, b.WEIGHT] * brought
    if rule == STATIC or shared == 0:
        return RULE if count else NOBODY
    work[c.ROWS] += asked
    base_s = c.round_s(base, drift, curve, rates, work) + own_s
    first = min(round(work[c.ROWS] + rates[c.PREFILL_ROW] * work[c.PREFILL]), curve.shape[0] - 1)
    extra = np.empty(min(most, curve.shape[0] - 1 - first) + 1)
    for k in range(extra.shape[0]):
        extra[k] = curve[first + k] - curve[first]
    chosen = np.zeros(count, np.bool_)
    free = 0
    for i in range(count):
        chosen[i] = ours[i] and limits[i] > 0 and (rule != PRICED or whole[slots[i], b.FREE] == 0)
        free += ours[i] and limits[i] > 0 and not chosen[i]
    walk = Walk(survival, real[:, b.WEIGHT], slots, row_s, limits, chosen, extra, lengths)
    if rule == RELAYED:
        budget = _relay(past, past_blocks, shared, extra, tokens, base_s)
        return _in_order(RELAYED, walk, 0, budget, tokens, base_s, price, decay, gains)
    stop = _in_order(rule, walk, 0, 0, tokens, base_s, price, decay, gains)
    if rule == CAUSAL:
        return stop
    if free:
        taken = 0
        for i in range(count):
            taken += lengths[i] if chosen[i] else 0
        for i in range(count):
            chosen[i] = ours[i] and limits[i] > 0 and not chosen[i]
        _in_order(_FREE, walk, taken, 0, tokens, base_s, price, decay, gains)
    for i in range(count):
        if ours[i] and lengths[i] < limits[i]:
            return NO_GAIN
    return EVERYTHING


class Walk(NamedTuple):
    """What a walk along the frontier reads, and the lengths that it writes."""

    survival: Array
    weights: Array  # by slot
    slots: Array
    row_s: Array
    limits: Array
    chosen: Array  # whose blocks it goes through
    extra: Array
    lengths: Array


@native
def _extra(extra: Array, rows: int) -> float:
    return extra[min(rows, extra.shape[0] - 1)]


@native
def _in_order(
    rule: int, w: Walk, taken: int, budget: int, tokens: float, base_s: float, price: float, decay: float, gains: Array
) -> int:
    """Go through candidates by decreasing weighted survival, a request's own from left to right, as the rule says.

    `lengths.causal`, `lengths.priced` (first its careful rows, then its free ones) and `lengths.top` are such walks.
    """
    count = w.chosen.shape[0]
    keys, seconds, thirds = np.empty(count + LOOK), np.empty(count + LOOK, np.int64), np.empty(count + LOOK, np.int64)
    entries = most = 0
    for i in range(count):
        if w.chosen[i]:
            most += w.limits[i]
            entries = push(keys, seconds, thirds, entries, -w.weights[w.slots[i]] * w.survival[i, 0], 0, i)
    order = np.empty(most if rule == _FREE else 0, np.int64)
    theta, own_s, profit, best = tokens / base_s, 0.0, 0.0, 0.0
    seen = keep = 0
    stop = EVERYTHING
    while entries:
        gain, j, i = keys[0], seconds[0], thirds[0]
        step = _extra(w.extra, taken + 1) - _extra(w.extra, taken) + w.row_s[i]
        if rule == CAUSAL:
            raised = (tokens - gain) / (base_s + own_s + w.row_s[i] + _extra(w.extra, taken + 1))
            if raised <= theta:
                stop = NO_GAIN
                break
            theta = raised
            tokens -= gain
            own_s += w.row_s[i]
        elif rule == PRICED:
            if -gain <= price * step and not _beyond(w, price, decay, taken, keys, seconds, thirds, entries):
                stop = NO_GAIN
                break
        elif rule == RELAYED:
            gains[seen] = -gain
        else:
            if seen >= keep + LOOK:
                break
            profit += -gain - price * step
            order[seen] = i
            if profit > best:
                best, keep = profit, seen + 1
        if rule in (CAUSAL, PRICED) or (rule == RELAYED and seen < budget):
            w.lengths[i] += 1
        taken += 1
        seen += 1
        if j + 1 == w.limits[i]:
            entries = pop(keys, seconds, thirds, entries)
        else:
            keys[0], seconds[0] = -w.weights[w.slots[i]] * w.survival[i, j + 1], j + 1
            sink(keys, seconds, thirds, entries)
    for k in range(keep):
        w.lengths[order[k]] += 1
    for k in range(seen, gains.shape[0]):
        gains[k] = np.nan
    if rule == RELAYED:
        return BUDGET if budget < seen else EVERYTHING
    return NOBODY if seen == 0 and stop == EVERYTHING else stop


@native
def _beyond(
    w: Walk, price: float, decay: float, taken: int, keys: Array, seconds: Array, thirds: Array, entries: int
) -> bool:
    """`lengths._beyond_the_stair`; leaves the heap as it was."""
    first = _extra(w.extra, taken + 1) - _extra(w.extra, taken)
    stairs = False
    for k in range(2, LOOK + 1):
        if not _extra(w.extra, taken + k) - _extra(w.extra, taken) >= 0.95 * k * first:
            stairs = True
    if not stairs:
        return False
    near, far, whose = np.empty(LOOK), np.empty(LOOK, np.int64), np.empty(LOOK, np.int64)
    count, left = 0, entries
    while count < LOOK and left:  # the best ones, taken out and put back
        near[count], far[count], whose[count] = keys[0], seconds[0], thirds[0]
        left = pop(keys, seconds, thirds, left)
        count += 1
    for k in range(count):
        left = push(keys, seconds, thirds, left, near[k], far[k], whose[k])
    profit = 0.0
    for k in range(1, LOOK + 1):
        if count == 0:
            return False
        gain, j, i = near[0], far[0], whose[0]
        profit -= gain + price * w.row_s[i]
        if profit > price * (_extra(w.extra, taken + k) - _extra(w.extra, taken)):
            return True
        if j + 1 < w.limits[i]:
            near[0], far[0] = gain * decay, j + 1
            sink(near, far, whose, count)
        else:
            count = pop(near, far, whose, count)
    return False


@native
def _relay(past: Array, past_blocks: int, blocks: int, extra: Array, tokens: float, base_s: float) -> int:
    """`policies.RelayedLengths`'s budget."""
    if past_blocks == 0:
        return 0
    stretch = blocks / past_blocks
    best, theta = 0, tokens / base_s
    for k in range(1, round(past.shape[0] * stretch) + 1):
        tokens += past[min(int((k - 1) / stretch), past.shape[0] - 1)]
        reached = tokens / (base_s + _extra(extra, k))
        if reached > theta:
            best, theta = k, reached
    return best
