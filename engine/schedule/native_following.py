"""Whether a request is worth following, natively: whether its drafts may ever earn what keeping its features costs.

Where the gallery (`native_outlook`) says that they do, newcomers are followed; where it says no, a scout is followed
now and then all the same, so that the gallery stays true. Both are paid for from what is put by: a small share of the
time, and of what drafting gains. Where nobody gains, no more than that can be lost.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import entry, native
from engine.schedule.native_outlook import outlook

Array = np.ndarray

SCOUT_SHARE = 0.004  # of the time goes into scouts at most
TRIAL_SHARE, WON_SHARE = 0.003, 2.0  # of the time, and of what drafting saves, into following whole batches
SAVED = 16.0  # rounds' time that may be saved up for either
FEW = 64.0  # tokens whose time may be saved up for trials where that is more: of few requests one may be hard for long
TRIAL = 32.0  # rounds in which features are kept of a batch that does not draft
SCOUT = 2  # the verdict on one
FIRST = 12  # requests of a band that are followed before its gallery is believed
LOOKS = 3  # blocks that a scout drafts at once
KEEPING = 1.3  # keeping features and taking them in, beside taking them in
HOPE, FADING = 0.3, 0.1  # how fast the share of the followed that went on drafting rises, and falls
RETRY = 0.03  # and how fast it rises with every scout: what once did not come true is tried again
MARGIN = 2.0  # what following a newcomer must bring, beside what it costs: the gallery holds the luckiest, too
AGAIN = 1.5  # what beginning again must bring, beside what it costs
FRESH = 10_000.0  # tokens since drafting paid, after which less is spent on finding out whether it does again,
LEAST = 0.25  # the longer ago, the less, down to this share
GAIN = 0.1  # how fast what keeping features and looking take is followed
_MOST_LOOK = 4.0  # rounds' time
STANDS = 8  # rounds for which an outlook stands while as many draft and decode


@entry
def follow(
    band: int,
    load: float,
    context: float,
    remaining: float,
    absorbed: float,
    spared: float,
    memory: Array,
    gallery: Array,
    tally: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
) -> int:
    """Whether a newcomer is followed: 0, or 1 because it pays, or 2 as a scout.

    Args:
        load: requests that will decode beside it, itself included; context: tokens that each will have.
        remaining: tokens that it may still write.
        absorbed: rows that the drafter would take in; spared: rows that the target would run again for that.
    """
    plain_s = _plain_s(load, context, base, drift, curve, rates)
    gain = _hope(band, load, context, load, plain_s, memory, gallery, tally, base, drift, curve, rates)
    look_s = _look_s(context, memory, base, drift, rates)
    spent_s = _keeping_s(load, absorbed, spared, base, drift, curve, rates) + look_s
    if np.isinf(gain):
        gain = 0.0
        if tally[band, -1] < FIRST:
            tally[band, -1] += 1
            return SCOUT
    if gain * remaining * plain_s > MARGIN * spent_s * load and _may_hope(load, spent_s, plain_s, memory):
        return 1
    spent_s += (LOOKS - 1) * look_s
    if memory[b.SCOUTS_S] < 0:  # whoever comes next, then: by what is left, short prompts alone would speak for all
        return 0
    memory[b.SCOUTS_S] -= spent_s
    return SCOUT


@native
def _look_s(context: float, memory: Array, base: Array, drift: Array, rates: Array) -> float:
    """Seconds of one block of a request beside others that do not draft: nothing that it needs is in the caches."""
    foretold_s = (
        c.draft_s(base, drift, rates, 1, context, 1.0) + c.absorb_s(base, drift, 1.0) + c.drafted_s(drift, rates)
    )
    return max(foretold_s, memory[b.LOOK_S])


@entry
def looked(seconds: float, share: float, memory: Array) -> None:
    """A round with drafts: where only probes drafted, what that took beside what it brought, `share` of what a round
    without brings."""
    if memory[b.BESIDE] == 0:
        more_s = min(max(seconds - share * memory[b.PLAIN_S], 0.0), _MOST_LOOK * memory[b.PLAIN_S])
        memory[b.LOOK_S] += GAIN * (more_s - memory[b.LOOK_S])


@native
def put_by(load: float, followed: int, tokens: float, plain_s: float, rounds: int, memory: Array) -> None:
    """What so many rounds add to what may be spent on scouts and on whole batches, and what keeping features took.

    Blocks cost less together, so that one newcomer followed alone shows little: what may be lost is saved up until it
    pays for a whole batch, and then whoever comes is followed until it is spent.

    Args:
        followed: requests whose features are kept because that is to pay.
    """
    most_s = SAVED * plain_s
    curious_s = curiosity(load, memory) * plain_s
    memory[b.SCOUTS_S] = min(memory[b.SCOUTS_S] + SCOUT_SHARE * curious_s * rounds, most_s)
    place = b.TRIALS_S + power(load)
    each_s = TRIAL_SHARE * curious_s
    if memory[b.BESIDE] > 0:
        memory[b.UNPAID + power(load)] = 0.0
        each_s += WON_SHARE * max(memory[b.PRICE] * plain_s / tokens - 1.0, 0.0) * plain_s
    else:
        memory[b.UNPAID + power(load)] += load * rounds
        if followed:
            each_s -= memory[b.KEEPING_S]
    memory[place] = min(memory[place] + each_s * rounds, _most_s(load, plain_s))


@native
def _most_s(load: float, plain_s: float) -> float:
    return max(SAVED, FEW / load) * plain_s


@native
def curiosity(load: float, memory: Array) -> float:
    """What share of the usual is spent on finding out whether drafting pays: the longer it has not, the less."""
    return min(max(FRESH / max(memory[b.UNPAID + power(load)], 1.0), LEAST), 1.0)


@native
def _may_hope(load: float, spent_s: float, plain_s: float, memory: Array) -> bool:
    """Whether somebody may be followed because that is to pay; it need not be asked while others draft with profit."""
    if memory[b.BESIDE] > 0:
        return True
    place, on = b.TRIALS_S + power(load), b.ON_TRIAL + power(load)
    if memory[place] < 0:
        memory[on] = 0.0
    elif memory[place] >= min(load * spent_s + TRIAL * memory[b.KEEPING_S], _most_s(load, plain_s)):
        memory[on] = 1.0
    if memory[on] == 0:
        return False
    memory[place] -= spent_s
    return True


@native
def returning(
    slots: Array,
    contexts: Array,
    behind: Array,
    whole: Array,
    memory: Array,
    gallery: Array,
    tally: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
    tokens: float,
    plain_s: float,
    load: int,
    context: float,
) -> int:
    """The place of somebody who is not followed and had better begin again; −1 for none.

    Args:
        behind: [R], −1 for those who are not followed.
        tokens, plain_s, context: of a plain round of the whole `load`, and of one of its requests.
    """
    count = slots.shape[0]
    best, best_s, place = 0.0, 0.0, -1
    gains = np.full(gallery.shape[0], np.nan)
    for i in range(count):
        slot = slots[i]
        if behind[i] >= 0 or whole[slot, b.MODE] != b.AUTO:
            continue
        band = whole[slot, b.BAND]
        if np.isnan(gains[band]):
            gains[band] = _hope(band, load, context, tokens, plain_s, memory, gallery, tally, base, drift, curve, rates)
        gain = gains[band]
        if not (np.isfinite(gain) and gain > 0):
            continue
        rows = contexts[i] + 1.0
        spent_s = AGAIN * _keeping_s(load, rows, rows, base, drift, curve, rates)
        left = whole[slot, b.END] - contexts[i] - 1
        if gain * left - spent_s * tokens / plain_s > best:
            best, best_s, place = gain * left - spent_s * tokens / plain_s, spent_s, i
    return place if place >= 0 and _may_hope(load, best_s, plain_s, memory) else -1


@native
def _hope(
    band: int,
    load: float,
    context: float,
    tokens: float,
    plain_s: float,
    memory: Array,
    gallery: Array,
    tally: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
) -> float:
    """`outlook`, as far as it has come true of late; worked out anew where others draft, or after some rounds."""
    place, beside = b.OUTLOOKS + b.OUTLOOK * band, memory[b.BESIDE]
    gain, known = memory[place], memory[place + 1 : place + b.OUTLOOK]
    stands = memory[b.ROUND] < known[0] and abs(known[1] - tokens) < 1e-6 * tokens and known[2] == beside
    if not stands:
        gain = outlook(band, load, context, tokens, plain_s, beside, gallery, tally, base, drift, curve, rates)
        if np.isfinite(gain):
            memory[place], known[0], known[1], known[2] = gain, memory[b.ROUND] + STANDS, tokens, beside
    return gain * memory[b.WENT_ON + power(load)]


@native
def power(load: float) -> int:
    """Of two, the highest in a load: loads alike are judged together."""
    return min(int(np.log2(max(load, 1.0))), b.LOADS - 1)


@entry
def ended(load: float, blocks: int, scout: bool, followed: float, memory: Array) -> None:
    """A followed request has ended, having drafted so many blocks: whether those like it do more than look.

    Of a scout nothing else was hoped for. And who was followed alone may have drafted with others: blocks cost less
    together, and the fewer were followed, the less it says that this one did not.

    Args:
        followed: share of the requests beside it that were followed, itself included.
    """
    place = b.WENT_ON + power(load)
    if blocks > LOOKS:
        memory[place] += HOPE * (1.0 - memory[place])
    elif scout:
        memory[place] += RETRY * (1.0 - memory[place])
    else:
        memory[place] -= FADING * followed * followed * memory[place]


@native
def _plain_s(load: float, context: float, base: Array, drift: Array, curve: Array, rates: Array) -> float:
    work = np.zeros(c.WORK)
    work[c.REQUESTS] = work[c.ROWS] = load
    work[c.CONTEXT] = load * context
    return c.round_s(base, drift, curve, rates, work)


@native
def _keeping_s(
    load: float, absorbed: float, again: float, base: Array, drift: Array, curve: Array, rates: Array
) -> float:
    """Seconds of taking in so many rows, and of running some of them again."""
    rows = rates[c.PREFILL_ROW] * again
    whole_s = c.rows_s(curve, load + rows) - c.rows_s(curve, load)
    return KEEPING * c.absorb_s(base, drift, absorbed) + whole_s
