"""What drafting would bring requests of a band, natively, by the gallery of those that drafted.

A request that is not followed costs what it would without a drafter, and cannot draft. The gallery of its band tells
whether its drafts may ever earn what keeping its features costs: the first blocks of the last requests that drafted at
all, each judged under the load of now.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule.jit import native

Array = np.ndarray

KNOWN = 4  # requests in the gallery before it is believed
DOUBT = 2.0  # blocks that the gallery's mean counts for beside a request's own: who looks best is often just lucky
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
