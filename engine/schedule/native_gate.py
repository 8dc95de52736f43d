"""Who drafts, natively: whether a block earns back what it costs, by past rounds alone."""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import native
from engine.schedule.native_certainty import class_of
from engine.schedule.native_following import curiosity, put_by, returning
from engine.schedule.native_heap import pop, push
from engine.schedule.native_judge import judge

Array = np.ndarray

DRAFTS, ASKED, PROBE, NO_GAIN, OFF, NO_ROOM, CHECK = 0, 1, 2, 3, 4, 5, 6  # sittings: record.Sitting in order
PROBE_SHARE = 0.003  # of the time goes into probes at most
ENOUGH, LOOKS = 24, 4  # blocks before a class counts as known, and how many a round are drafted until then
FIRST_LOOK = 0.01  # of a newcomer's own time may go into one look at it
REVIEW = 8  # rounds between two decisions while the batch stays the same
WHOLE_EVERY = 16  # blocks of which one is drafted whole where shorter ones do: what lies behind is to stay known
# Rounds of drafting before some without: what those take by now, nothing else would show. Twice as many each time.
FIRST_CHECK, CHECK_EVERY = 8, 128
CHECKS = 3  # rounds without: in the first, what they need is not in the caches yet
CLEAR = 1.3  # four times as many where drafting brings so much more
REST = 32  # rounds without a decision at most


@native
def decide(
    judged: bool,
    changed: bool,
    rested: int,
    row_cap: int,
    load: int,
    slots: Array,
    contexts: Array,
    behind: Array,
    whole: Array,
    real: Array,
    curves: Array,
    classes: Array,
    class_count: Array,
    gallery: Array,
    tally: Array,
    memory: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
    limits: Array,
    sittings: Array,
) -> tuple[int, int, int]:
    """One sitting and one limit a decoding request -> (drafting, block length, rounds until it need be asked again).

    Args:
        judged: drafting is a decision (AutoLengths); otherwise all that may draft do.
        changed: other requests than last time; rested: rounds since that nobody decided.
        row_cap: draft tokens a request, by what a round may hold.
        load: requests that decode or will in a moment, when their prompts have run: what a second is worth is judged
            by them all, or prompts in between would make a busy machine look idle.
        slots, contexts, behind: [R]; rows of the books, cached tokens, and those that the drafter has not absorbed, −1
            of who is not followed.
        limits, sittings: [R], filled.
    """
    count = slots.shape[0]
    work = np.zeros(c.WORK)
    work[c.REQUESTS] = work[c.ROWS] = count
    work[c.DRAFT_SHARE] = 1.0
    tokens = 0.0
    places = np.empty(count, np.int64)
    open_ones = 0
    strangers = 0  # who might draft, were they followed
    hoped = 0  # who are followed because that is to pay
    asked = 0  # who draft whether that pays or not
    for i in range(count):
        slot = slots[i]
        limit = min(min(whole[slot, b.CAP], row_cap), whole[slot, b.END] - contexts[i] - 2)
        limits[i] = max(limit, 0)
        tokens += real[slot, b.WEIGHT]
        work[c.CONTEXT] += contexts[i]
        if whole[slot, b.MODE] == b.OFF:
            sittings[i] = OFF
        elif limit <= 0:
            sittings[i] = NO_ROOM
        elif behind[i] < 0:
            strangers += 1
            sittings[i] = NO_GAIN if judged and whole[slot, b.MODE] == b.AUTO else NO_ROOM
        else:
            sittings[i] = ASKED
            if judged and whole[slot, b.MODE] == b.AUTO:
                places[open_ones] = i
                open_ones += 1
                hoped += whole[slot, b.LOOKS] == 0  # a scout is to look, and then goes
            else:
                asked += 1
    memory[b.ROUND] += 1 + rested
    memory[b.RETURNS] = -1
    checks_left, memory[b.CHECKING] = max(memory[b.CHECKING] - 1, 0.0), 0.0
    wait = 1 << 40
    if judged:
        share = load / max(count, 1)
        tokens *= share
        work[c.CONTEXT] *= share
        work[c.REQUESTS] = work[c.ROWS] = load
        plain_s = c.round_s(base, drift, curve, rates, work)
        chosen = places[:open_ones]
        memory[b.PLAIN_S] = plain_s
        put_by(load, hoped, tokens, plain_s, 1 + rested, memory)
        if changed or memory[b.ROUND] >= memory[b.REVIEW_AT]:
            if strangers:
                memory[b.RETURNS] = returning(
                    slots,
                    contexts,
                    behind,
                    whole,
                    memory,
                    gallery,
                    tally,
                    base,
                    drift,
                    curve,
                    rates,
                    tokens,
                    plain_s,
                    load,
                    work[c.CONTEXT] / load,
                )
            judge(
                chosen,
                slots,
                contexts,
                limits,
                whole,
                real,
                curves,
                classes,
                class_count,
                memory,
                base,
                drift,
                curve,
                rates,
                load,
                tokens,
                plain_s,
            )
            memory[b.REVIEW_AT] = memory[b.ROUND] + REVIEW
        idle = 0
        for k in range(open_ones):
            drafts = whole[slots[chosen[k]], b.DRAFTING]
            sittings[chosen[k]] = DRAFTS if drafts else NO_GAIN
            idle += 1 - drafts
        if _checks(checks_left, open_ones - idle, asked, tokens, plain_s, rested, memory):
            for k in range(open_ones):
                sittings[chosen[k]] = CHECK if sittings[chosen[k]] == DRAFTS else NO_GAIN
            wait = 0
        elif idle:
            memory[b.ALLOWANCE_S] += PROBE_SHARE * curiosity(load, memory) * plain_s * (1 + rested)
            memory[b.ALLOWANCE_S] = min(memory[b.ALLOWANCE_S], 4 * plain_s)
            wait = _probe(
                chosen,
                slots,
                contexts,
                behind,
                whole,
                real,
                class_count,
                memory,
                base,
                drift,
                rates,
                sittings,
                plain_s,
                load,
            )
    for i in range(count):  # whoever is to draft by rule begins again at once
        if behind[i] < 0 and sittings[i] == NO_ROOM and limits[i] > 0:
            memory[b.RETURNS] = i
    drafting, longest, probes = 0, 0, 0
    for i in range(count):
        if sittings[i] <= PROBE:
            drafting += 1
            longest = max(longest, limits[i])
            probes += sittings[i] == PROBE
    if memory[b.CHECKING] == 0.0:
        memory[b.BESIDE] = drafting - probes
    length = longest
    if drafting and judged:
        if probes:
            memory[b.REVIEW_AT] = memory[b.ROUND] + 1  # what they showed counts at once
        elif drafting == open_ones:  # nobody asked for more
            memory[b.SINCE_WHOLE] += 1
            if memory[b.SINCE_WHOLE] >= WHOLE_EVERY:
                memory[b.SINCE_WHOLE] = 0
            else:
                length = min(longest, int(memory[b.LENGTH]))
    if drafting:
        return drafting, length, 0
    return 0, length, min(wait, REVIEW if open_ones else REST if strangers else wait)


@native
def _checks(left: float, drafting: int, asked: int, tokens: float, plain_s: float, rested: int, memory: Array) -> bool:
    """Whether those that would draft sit out for a few rounds, which show what one without drafts takes by now.

    Args:
        left: rounds that are left of the last few.
    """
    if not drafting:
        memory[b.SINCE_PLAIN] = 0
        return False
    memory[b.SINCE_PLAIN] += 1 + rested
    if asked:
        return False
    if left > 0:
        memory[b.CHECKING] = left
        memory[b.SINCE_PLAIN] = 0
        if left == 1:
            memory[b.REVIEW_AT] = memory[b.ROUND] + 1  # what they showed counts at once
        return True
    if memory[b.SINCE_PLAIN] <= memory[b.CHECK_AFTER]:
        return False
    most = CHECK_EVERY * (4.0 if memory[b.PRICE] * plain_s > CLEAR * tokens else 1.0)
    memory[b.CHECK_AFTER] = min(max(2 * memory[b.CHECK_AFTER], FIRST_CHECK), most)
    memory[b.SINCE_PLAIN] = 0
    memory[b.CHECKING] = CHECKS
    return True


@native
def _probe(
    places: Array,
    slots: Array,
    contexts: Array,
    behind: Array,
    whole: Array,
    real: Array,
    class_count: Array,
    memory: Array,
    base: Array,
    drift: Array,
    rates: Array,
    sittings: Array,
    plain_s: float,
    load: int,
) -> int:
    """Spend what probing may cost on those that have sat out longest; rounds until the next probe may be due.

    A newcomer gets one look that its own remaining time pays for.
    """
    count = places.shape[0]
    keys, order, spare = np.empty(count), np.empty(count, np.int64), np.empty(count, np.int64)
    entries = already = looks = 0
    for k in range(count):
        if sittings[places[k]] == NO_GAIN:
            entries = push(keys, order, spare, entries, float(whole[slots[places[k]], b.LAST_DRAFT]), k, 0)
        else:
            already += 1
    share_s = plain_s / load  # of a round that a request may call its own
    while entries:
        i = places[order[0]]
        slot = slots[i]
        entries = pop(keys, order, spare, entries)
        if whole[slot, b.LOOKS] > 0:
            whole[slot, b.LOOKS] -= 1
            sittings[i] = PROBE
            already += 1
            continue
        if class_count[class_of(slot, whole, real)] < ENOUGH:
            if looks < LOOKS:
                looks += 1
                sittings[i] = PROBE
                already += 1
            continue
        step_s = c.draft_s(base, drift, rates, already + 1, contexts[i], 1.0)
        step_s += c.absorb_s(base, drift, behind[i]) + c.absorb_s(base, drift, 1.0)
        step_s -= c.draft_s(base, drift, rates, already, 0.0, 1.0)
        if not already:
            step_s = max(step_s + c.drafted_s(drift, rates), memory[b.LOOK_S])
        last = whole[slot, b.LAST_DRAFT]
        remaining = whole[slot, b.END] - contexts[i] - 1
        if last >= 0 or step_s > FIRST_LOOK * remaining * share_s:
            if last + REVIEW > memory[b.ROUND]:
                return int(last + REVIEW - memory[b.ROUND])
            if step_s > memory[b.ALLOWANCE_S]:
                return int((step_s - memory[b.ALLOWANCE_S]) / (PROBE_SHARE * plain_s))
            memory[b.ALLOWANCE_S] -= step_s
        sittings[i] = PROBE
        already += 1
    return 0
