"""How much of each drafted block to verify: pure functions of survivals, costs and past rounds.

Rejection sampling stays lossless only under *non-anticipating* choices: whether position k is verified must not depend
on x_k (DSpark paper, Appendix A). Confidence c_k is a function of the tokens before x_k, so it is safe to look
at c_k once positions 1 … k−1 are admitted, and never before. Everything here that serves rejection rows works so:
it sees one *frontier* candidate a request, takes one or stops, and only then sees what lies behind the one taken. Rows
whose text does not depend on the schedule at all (coupled, greedy) may be searched with hindsight.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Row
from dataclasses import dataclass

from engine.schedule.record import Stop
from engine.types import Speculation

LOOK = 16  # rows that a search looks past a candidate that does not pay: the widest stair it gets over


@dataclass(frozen=True, slots=True)
class Candidate:
    """One drafted block, and what the request says about it."""

    confidence: Row[float] | None  # as the drafter gave it, conditional, left to right; None without a head
    limit: int  # tokens that may be verified: block, pages, max_tokens and context allow no more
    speculation: Speculation
    survival: Row[float] = ()  # corrected and cumulative: a[j] = Π_{i≤j} c[i], at least `limit` of them
    weight: float = 1.0
    row_s: float = 0.0  # seconds that the request's own context adds to each verified row
    free: bool = False  # coupled or greedy: its text is the same under every schedule


@dataclass(frozen=True, slots=True)
class Frame:
    """A round without a single verified draft token, and what each one would add.

    Args:
        tokens: weighted tokens that the round brings anyway.
        base_s: its seconds.
        extra_s: [n + 1] seconds that m more rows add; extra_s[0] = 0, non-decreasing; the last one stands for more.
        price: weighted tokens that a second is worth elsewhere.
        decay: the share of a candidate's survival that the one behind it usually has, from past rounds.
    """

    tokens: float
    base_s: float
    extra_s: Row[float]
    price: float = 0.0
    decay: float = 0.6

    def extra(self, rows: int) -> float:
        return self.extra_s[min(rows, len(self.extra_s) - 1)]


@dataclass(frozen=True, slots=True)
class Choice:
    """Verified lengths, one a candidate."""

    lengths: list[int]
    stop: Stop


def fixed_length(limit: int, draft_tokens: int | None) -> int:
    """The first `draft_tokens`, or the whole block."""
    return limit if draft_tokens is None else min(limit, draft_tokens)


def threshold_length(confidence: Row[float] | None, limit: int, threshold: float) -> int:
    """The longest prefix whose every conditional confidence reaches `threshold`; all without a head."""
    if confidence is None:
        return limit
    for k in range(limit):
        if confidence[k] < threshold:
            return k
    return limit


_Entry = tuple[float, int, int]  # −weighted survival, position, candidate: ties never look at tokens


def _frontier(candidates: Row[Candidate]) -> list[_Entry]:
    heap = [(-c.weight * c.survival[0], 0, i) for i, c in enumerate(candidates) if c.limit > 0]
    heapq.heapify(heap)
    return heap


def _advance(heap: list[_Entry], candidates: Row[Candidate]) -> None:
    """Take the best frontier candidate; the one behind it, if there is one, becomes visible."""
    _, j, i = heap[0]
    candidate = candidates[i]
    if j + 1 < candidate.limit:
        heapq.heapreplace(heap, (-candidate.weight * candidate.survival[j + 1], j + 1, i))
    else:
        heapq.heappop(heap)


def causal(candidates: Row[Candidate], frame: Frame) -> Choice:
    """Algorithm 1: admit by decreasing weighted survival; stop at the first that does not raise Θ = τ / T.

    O(R + m log R) for m admitted tokens.
    """
    lengths = [0] * len(candidates)
    heap = _frontier(candidates)
    tokens, own_s, taken = frame.tokens, 0.0, 0
    theta = tokens / frame.base_s
    while heap:
        gain, _, i = heap[0]
        seconds = frame.base_s + own_s + candidates[i].row_s + frame.extra(taken + 1)
        raised = (tokens - gain) / seconds
        if raised <= theta:
            return Choice(lengths, Stop.NO_GAIN)
        theta = raised
        tokens -= gain
        own_s += candidates[i].row_s
        taken += 1
        lengths[i] += 1
        _advance(heap, candidates)
    return Choice(lengths, Stop.EVERYTHING if taken else Stop.NOBODY)


def priced(candidates: Row[Candidate], frame: Frame) -> Choice:
    """Admit what brings more tokens than its seconds would bring elsewhere: w·a > price · ΔT.

    With the long-run rate as price this maximises tokens over seconds of many rounds, where Algorithm 1 maximises each
    round's own ratio (Dinkelbach's argument for ratios). Rejection rows come first, along the frontier; then free rows
    are searched with hindsight. The frontier gets over a stair of T when what lies behind is *expected* to pay
    for it, by `frame.decay` alone.
    """
    lengths = [0] * len(candidates)
    taken = _along_the_frontier(candidates, frame, lengths)
    _with_hindsight(candidates, frame, lengths, taken)
    if not candidates:
        return Choice(lengths, Stop.NOBODY)
    everything = all(length >= c.limit for length, c in zip(lengths, candidates, strict=True))
    return Choice(lengths, Stop.EVERYTHING if everything else Stop.NO_GAIN)


def _along_the_frontier(candidates: Row[Candidate], frame: Frame, lengths: list[int]) -> int:
    """Lengths of the rows that are not free, changed in place; tokens admitted."""
    heap = [entry for entry in _frontier(candidates) if not candidates[entry[2]].free]
    heapq.heapify(heap)
    taken = 0
    while heap:
        gain, _, i = heap[0]
        cost = frame.price * (frame.extra(taken + 1) - frame.extra(taken) + candidates[i].row_s)
        if -gain <= cost and not _beyond_the_stair(heap, candidates, frame, taken):
            return taken
        taken += 1
        lengths[i] += 1
        _advance(heap, candidates)
    return taken


def _beyond_the_stair(heap: list[_Entry], candidates: Row[Candidate], frame: Frame, taken: int) -> bool:
    """Whether the next rows together are expected to pay. Sees the frontier; what lies behind it is guessed."""
    first = frame.extra(taken + 1) - frame.extra(taken)
    if all(frame.extra(taken + k) - frame.extra(taken) >= 0.95 * k * first for k in range(2, LOOK + 1)):
        return False  # no stair ahead: later rows cost as much as this one
    guess = heapq.nsmallest(LOOK, heap)
    left = {i: candidates[i].limit - j for _, j, i in guess}
    profit = 0.0
    for k in range(1, LOOK + 1):
        if not guess:
            return False
        gain, j, i = guess[0]
        profit -= gain + frame.price * candidates[i].row_s
        if profit > frame.price * (frame.extra(taken + k) - frame.extra(taken)):
            return True
        left[i] -= 1
        if left[i]:
            heapq.heapreplace(guess, (gain * frame.decay, j + 1, i))
        else:
            heapq.heappop(guess)
    return False


def _with_hindsight(candidates: Row[Candidate], frame: Frame, lengths: list[int], taken: int) -> None:
    """The best prefix, by profit, of all free candidates in decreasing order; changes lengths in place."""
    heap = [entry for entry in _frontier(candidates) if candidates[entry[2]].free]
    heapq.heapify(heap)
    profit = best = 0.0
    order: list[int] = []
    keep = 0
    before = frame.extra(taken)
    while heap and len(order) < keep + LOOK:
        gain, _, i = heap[0]
        after = frame.extra(taken + len(order) + 1)
        profit += -gain - frame.price * (after - before + candidates[i].row_s)
        before = after
        order.append(i)
        if profit > best:
            best, keep = profit, len(order)
        _advance(heap, candidates)
    for i in order[:keep]:
        lengths[i] += 1


def best_budget(gains: Row[float], frame: Frame) -> int:
    """The K that maximises Θ over the first K of `gains` (weighted survivals, decreasing): global search."""
    best, theta, tokens = 0, frame.tokens / frame.base_s, frame.tokens
    for k, gain in enumerate(gains, start=1):
        tokens += gain
        reached = tokens / (frame.base_s + frame.extra(k))
        if reached > theta:
            best, theta = k, reached
    return best


def top(candidates: Row[Candidate], budget: int) -> Choice:
    """The `budget` candidates of highest weighted survival; non-anticipating if the budget is older than the block."""
    lengths = [0] * len(candidates)
    heap = _frontier(candidates)
    for _ in range(budget):
        if not heap:
            return Choice(lengths, Stop.EVERYTHING)
        lengths[heap[0][2]] += 1
        _advance(heap, candidates)
    return Choice(lengths, Stop.BUDGET if heap else Stop.EVERYTHING)


def gains_in_order(candidates: Row[Candidate]) -> list[float]:
    """Every candidate's weighted survival, highest first."""
    return sorted((c.weight * a for c in candidates for a in c.survival[: c.limit]), reverse=True)
