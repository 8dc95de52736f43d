"""Whether a request is worth following, natively: whether its drafts may ever earn what keeping its features costs.

A request that is not followed costs what it would without a drafter, and cannot draft. The gallery of its band decides:
the first blocks of the last requests that drafted at all, each judged under the load of now. Where it says no, a scout
is followed now and then all the same, for a small share of the machine's time, so that the gallery stays true.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import entry, native

Array = np.ndarray

SCOUT_SHARE = 0.004  # of the time goes into scouts at most
SAVED = 16.0  # rounds' time that may be saved up for them
SCOUT = 2  # the verdict on one
KNOWN = 4  # requests in the gallery before it is believed
FIRST = 12  # requests of a band that are followed before it is
LOOKS = 3  # blocks that a scout drafts at once
DOUBT = 2.0  # blocks that the gallery's mean counts for beside a request's own: who looks best is often just lucky
KEEPING = 1.3  # keeping features and taking them in, beside taking them in
HOPE, FADING = 0.3, 0.1  # how fast the share of the followed that went on drafting rises, and falls
RETRY = 0.03  # and how fast it rises with every scout: what once did not come true is tried again
MARGIN = 2.0  # what following a newcomer must bring, beside what it costs: the gallery holds the luckiest, too
AGAIN = 1.5  # what beginning again must bring, beside what it costs
ROWS_EACH = 3.0
AHEAD = 4.0  # rows over which the price of one more is taken, at least


@native
def outlook(
    band: int,
    decoding: float,
    context: float,
    tokens: float,
    plain_s: float,
    beside: float,
    gallery: Array,
    tally: Array,
    base: Array,
    drift: Array,
    curve: Array,
    rates: Array,
) -> float:
    """Tokens a round that drafting would bring a request of this band, beside what its time brings elsewhere.

    Infinite while too little is known. A request for which it would not pay would not draft, and counts as 0.

    Args:
        decoding: requests in a round; context: tokens of each.
        tokens, plain_s: what a round without drafts brings and takes.
        beside: requests that draft already: one more block costs what it adds. 0: as many begin as is best for all.
        gallery: [BANDS, G, blocks, γ] survivals; tally: [BANDS, G + 2], blocks of each entry, entries ever made,
            requests followed before anything was known.
    """
    size, block = gallery.shape[1], gallery.shape[3]
    entries = min(tally[band, size], size)
    if entries < KNOWN:
        return np.inf
    price = tokens / plain_s
    began, more = (decoding + ROWS_EACH * beside, AHEAD) if beside > 0 else (decoding, max(ROWS_EACH * decoding, AHEAD))
    # The first rows are the dearest, since a round with drafts takes longer anyway.
    row_s = (c.rows_s(curve, began + more) - c.rows_s(curve, began)) / more
    dear = price * (row_s + rates[c.ROW_CONTEXT_S] * np.exp(drift[c.VERIFY, c.SPEED]) * context)
    most = 1 if beside > 0 else max(int(decoding), 1)
    costs = np.empty(most)  # tokens that the time of so many blocks more would bring otherwise
    already_s = _blocks_s(beside, context, base, drift, rates) if beside > 0 else 0.0
    for n in range(most):
        costs[n] = price * (_blocks_s(beside + n + 1.0, context, base, drift, rates) - already_s)
    gained, gains = np.zeros(entries), np.empty(entries)
    best = 0.0
    for j in range(block):
        mean = 0.0
        for entry_ in range(entries):
            blocks = min(tally[band, entry_], gallery.shape[2])
            for n in range(blocks):
                gained[entry_] += max(gallery[band, entry_, n, j] - dear, 0.0) / blocks
            mean += gained[entry_] / entries
        if j + 1 < block and rates[c.DRAFT_SLOTS] <= 0:  # shorter blocks cost as much
            continue
        for entry_ in range(entries):
            blocks = min(tally[band, entry_], gallery.shape[2])
            gains[entry_] = (blocks * gained[entry_] + DOUBT * mean) / (blocks + DOUBT)
        share = 1 - rates[c.DRAFT_SLOTS] * (1 - (j + 1) / block)
        best = max(best, _beside(gains, share * costs[0]) if beside > 0 else _together(gains, share, costs))
    return best


@native
def _beside(gains: Array, cost: float) -> float:
    """What drafting brings somebody like these, who drafts if it brings more than it costs."""
    expected = 0.0
    for gain in gains:
        expected += max(gain - cost, 0.0) / gains.shape[0]
    return expected


@native
def _together(gains: Array, share: float, costs: Array) -> float:
    """What drafting brings each of a batch of such, as many drafting as is best for all: blocks cost less together.

    Args:
        costs: of one block, two, …; the last one is of the whole batch.
    """
    most, count = costs.shape[0], gains.shape[0]
    falling = np.sort(gains)[::-1]
    best = taken = 0.0
    for k in range(count):
        taken += falling[k]
        drafting = (k + 1) * most / count  # of the batch; of less than one, in some rounds one
        low = min(max(int(drafting), 1), most - 1)
        cost = costs[0] * drafting
        if drafting > 1:
            cost = costs[low - 1] + (drafting - low) * (costs[low] - costs[low - 1])
        best = max(best, taken / count - share * cost / most)
    return best


@native
def _blocks_s(blocks: float, context: float, base: Array, drift: Array, rates: Array) -> float:
    """Seconds of so many blocks of requests with so much context, and of taking in what they bring."""
    seconds = c.table_s(base, c.DRAFT, blocks) + rates[c.DRAFT_CONTEXT_S] * blocks * context
    seconds *= c.factor(drift, c.DRAFT, blocks)
    return seconds + c.absorb_s(base, drift, 2.0 * blocks) + c.drafted_s(drift, rates)


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
    beside = memory[b.BESIDE]
    gain = outlook(band, load, context, load, plain_s, beside, gallery, tally, base, drift, curve, rates)
    gain *= memory[b.WENT_ON + _power(load)]
    look_s = c.draft_s(base, drift, rates, 1, context, 1.0) + c.absorb_s(base, drift, 1.0) + c.drafted_s(drift, rates)
    spent_s = _keeping_s(load, absorbed, spared, base, drift, curve, rates) + look_s
    if np.isinf(gain):
        gain = 0.0
        if tally[band, -1] < FIRST:
            tally[band, -1] += 1
            return SCOUT
    if gain * remaining * plain_s > MARGIN * spent_s * load:
        return 1
    spent_s += (LOOKS - 1) * look_s
    if memory[b.SCOUTS_S] < 0:  # whoever comes next, then: by what is left, short prompts alone would speak for all
        return 0
    memory[b.SCOUTS_S] -= spent_s
    return SCOUT


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
    best, place = 0.0, -1
    gains = np.full(gallery.shape[0], np.nan)
    for i in range(count):
        slot = slots[i]
        if behind[i] >= 0 or whole[slot, b.MODE] != b.AUTO:
            continue
        band = whole[slot, b.BAND]
        if np.isnan(gains[band]):
            beside = memory[b.BESIDE]
            gains[band] = outlook(
                band, load, context, tokens, plain_s, beside, gallery, tally, base, drift, curve, rates
            )
            gains[band] *= memory[b.WENT_ON + _power(load)]
        gain = gains[band]
        rows = contexts[i] + 1.0
        spent = AGAIN * _keeping_s(load, rows, rows, base, drift, curve, rates) * tokens / plain_s
        left = whole[slot, b.END] - contexts[i] - 1
        if np.isfinite(gain) and gain * left - spent > best:
            best, place = gain * left - spent, i
    return place


@native
def _power(load: float) -> int:
    return min(int(np.log2(max(load, 1.0))), b.LOADS - 1)


@entry
def ended(load: float, blocks: int, scout: bool, followed: float, memory: Array) -> None:
    """A followed request has ended, having drafted so many blocks: whether those like it do more than look.

    Of a scout nothing else was hoped for. And who was followed alone may have drafted with others: blocks cost less
    together, and the fewer were followed, the less it says that this one did not.

    Args:
        followed: share of the requests beside it that were followed, itself included.
    """
    place = b.WENT_ON + _power(load)
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


@native
def hang(slot: int, band: int, expected: Array, whole: Array, gallery: Array, tally: Array) -> None:
    """Enter a block into the gallery, while its request's place there is not another's."""
    size = gallery.shape[1]
    if whole[slot, b.GALLERY] < 0:
        whole[slot, b.GALLERY] = tally[band, size]
        tally[band, tally[band, size] % size] = 0
        tally[band, size] += 1
    number = whole[slot, b.GALLERY]
    if number + size < tally[band, size]:
        return
    place = number % size
    gallery[band, place, tally[band, place] % gallery.shape[2]] = expected
    tally[band, place] += 1
