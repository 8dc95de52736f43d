"""Who drafts: whether a block earns back what drafting, verifying and absorbing it cost, by past rounds alone.

A request is judged by the survivals of its last blocks, a batch by all of them together. Those that sit out are
probed now and then, for a small share of the machine's time, so that drafting comes back when it pays again.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

import numpy as np

from engine.schedule.cost import LiveCost, Work
from engine.schedule.record import Sitting
from engine.schedule.reliability import BANDS

Array = np.ndarray

BLOCKS = 16  # blocks by which a request is judged
CLASS_BLOCKS = 64  # blocks of its band, by which those without a past are judged
CLASS_WEIGHT = 8.0  # blocks that the band counts for beside a request's own: who looks best of many is often just lucky
PROBE_SHARE = 0.005  # of the time goes into probes at most
ENOUGH, LOOKS = 24, 4  # blocks before a band counts as known, and how many a round are drafted until then
FIRST_LOOK = 0.01  # of a newcomer's own time may go into one look at it
GAIN = 1.01  # drafting starts when it promises this much, and stops below 1
REVIEW = 8  # rounds between two decisions while the batch stays the same


@dataclass(slots=True)
class Outlook:
    """What the scheduler remembers of a running request."""

    band: int
    slot: int  # its place in the gate's books
    blocks: int = 0  # drafted so far
    last_draft: int = -1  # round
    checked: float = 4.0  # drafted tokens that met the target, fading; begins as a mild guess
    kept: float = 2.4
    rate: float = 0.0  # tokens a second, fading; 0 until two rounds are seen
    last_round_s: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the checked draft tokens that were kept lately."""
        return self.kept / self.checked

    def saw(self, verified: int, accepted: int) -> None:
        """A verified block's fate."""
        checks = min(accepted + 1, verified)
        self.checked = 4.0 + 0.97 * (self.checked - 4.0) + checks
        self.kept = 2.4 + 0.97 * (self.kept - 2.4) + accepted


@dataclass(frozen=True, slots=True)
class Prospect:
    """A request that may draft this round."""

    outlook: Outlook
    weight: float
    limit: int  # draft tokens it could use
    context: int
    behind: int  # rows that must be absorbed before it can draft
    remaining: int  # tokens until max_tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """Who drafts, why, and what a second is worth (weighted tokens)."""

    sittings: list[Sitting]
    price: float


class DraftGate:
    """Decides who drafts.

    Args:
        cost: corrected by the caller, round by round.
        block_size: γ.
    """

    def __init__(self, cost: LiveCost, block_size: int) -> None:
        self.cost = cost
        self._curves = np.zeros((16, BLOCKS, block_size))
        self._free = list(range(15, -1, -1))
        self._class = np.zeros((BANDS, CLASS_BLOCKS, block_size))
        self._class_count = np.zeros(BANDS, np.int64)
        self._drafting = False
        self._allowance_s = 0.0
        self._round = 0
        self._review = 0
        self._batch: object = None
        self._drafts: list[bool] = []
        self._price = 0.0

    def enter(self, band: int) -> Outlook:
        """A new request's outlook, with an empty past."""
        if not self._free:
            size = len(self._curves)
            self._curves = np.concatenate([self._curves, np.zeros_like(self._curves)])
            self._free = list(range(2 * size - 1, size - 1, -1))
        slot = self._free.pop()
        self._curves[slot] = 0.0
        return Outlook(band, slot)

    def leave(self, outlook: Outlook) -> None:
        """A request is gone."""
        self._free.append(outlook.slot)

    def saw(self, outlooks: Row[Outlook], curves: Array) -> None:
        """Corrected survivals [R, γ] of the blocks that these requests drafted this round."""
        for outlook, curve in zip(outlooks, curves, strict=True):
            self._curves[outlook.slot, outlook.blocks % BLOCKS] = curve
            outlook.blocks += 1
            outlook.last_draft = self._round
            self._class[outlook.band, self._class_count[outlook.band] % CLASS_BLOCKS] = curve
            self._class_count[outlook.band] += 1

    def choose(self, prospects: Row[Prospect], plain: Work, tokens: float, batch: object) -> Draw:
        """One sitting a prospect.

        Args:
            plain: the round without any draft.
            tokens: Σ of all decoding requests' weights.
            batch: equal between two rounds of the same requests.
        """
        self._round += 1
        plain_s = self.cost.times(plain).total
        if self._batch != batch or self._round >= self._review:
            self._drafts, self._price = self._judge(prospects, plain, plain_s, tokens)
            self._batch, self._review = batch, self._round + REVIEW
        sittings = [Sitting.DRAFTS if yes else Sitting.NO_GAIN for yes in self._drafts]
        if Sitting.NO_GAIN in sittings:
            self._probe(prospects, sittings, plain_s)
        return Draw(sittings, self._price)

    def _judge(self, prospects: Row[Prospect], plain: Work, plain_s: float, tokens: float) -> tuple[list[bool], float]:
        """Dinkelbach's iteration on Σ w·tokens / T over who drafts; the verified lengths follow the price."""
        count = len(prospects)
        base_rate = price = tokens / plain_s
        if not count:
            return [], base_rate
        chosen = np.zeros(0, np.int64)
        rows = float(count)
        for _ in range(3):
            row_s = self._row_s(plain, rows)
            profit, length = self._values(prospects, price, row_s)
            order = np.argsort(-profit, kind="stable")
            contexts = np.cumsum([prospects[i].context for i in order])
            overhead = self._overheads_s(contexts)
            net = np.cumsum(profit[order]) - price * overhead
            best = int(np.argmax(net))
            if net[best] <= 0:
                chosen = order[:0]
                break
            chosen = order[: best + 1]
            rows = float(length[chosen].sum())
            surplus = float(net[best]) + tokens - price * plain_s
            price += surplus / (plain_s + float(overhead[best]) + rows * row_s)
        self._drafting = bool(len(chosen)) and price > base_rate * (1.0 if self._drafting else GAIN)
        drafts = [False] * count
        if self._drafting:
            for i in chosen.tolist():
                drafts[i] = True
        return drafts, price if self._drafting else base_rate

    def _overheads_s(self, contexts: Array) -> Array:
        """Seconds of drafting 1 … n blocks with so much context in all, and of absorbing what they commit.

        Exact at powers of two and at n, linear between them.
        """
        count = len(contexts)
        at = sorted({*(2**k for k in range(count.bit_length())), count})
        seconds = [self.cost.draft_s(n, int(contexts[n - 1])) + self.cost.absorb_s(2 * n) for n in at]
        return np.interp(np.arange(1, count + 1), at, seconds)

    def _row_s(self, plain: Work, rows: float) -> float:
        """What a verified row costs around the size that the round would have."""
        first = plain.rows + self.cost.table.prefill_row * plain.prefill
        span = max(rows, 2.0)
        return (self.cost.rows_s(first + span) - self.cost.rows_s(first)) / span

    def _values(self, prospects: Row[Prospect], price: float, row_s: float) -> tuple[Array, Array]:
        """Expected profit (weighted tokens) of a block of each prospect, and the rows it would verify."""
        outlooks = [prospect.outlook for prospect in prospects]
        weights = np.array([prospect.weight for prospect in prospects])
        limits = np.array([prospect.limit for prospect in prospects])
        bands = np.array([outlook.band for outlook in outlooks])
        own = np.minimum([outlook.blocks for outlook in outlooks], BLOCKS)
        context_s = self.cost.table.row_context_s * self.cost.speed
        row_price = price * (row_s + context_s * np.array([prospect.context for prospect in prospects]))
        usable = np.arange(self._curves.shape[2]) < limits[:, None]

        def worth(curves: Array) -> tuple[Array, Array]:
            """Σ over a request's blocks [R, n, γ]; blocks not filled yet are zeros and bring nothing."""
            gain = curves * weights[:, None, None] - row_price[:, None, None]
            taken = (gain > 0) & usable[:, None, :]
            return np.where(taken, gain, 0.0).sum((1, 2)), taken.sum((1, 2))

        profit, rows = worth(self._curves[[outlook.slot for outlook in outlooks]])
        shared = np.minimum(self._class_count[bands], CLASS_BLOCKS)
        if (own < BLOCKS).any():
            weight = np.where(shared > 0, CLASS_WEIGHT / np.maximum(shared, 1), 0.0)
            more, longer = worth(self._class[bands])
            profit, rows = profit + weight * more, rows + weight * longer
            total = own + np.where(shared > 0, CLASS_WEIGHT, 0.0)
        else:
            total = own
        total = np.maximum(total, 1.0)  # of whom nothing is known, nothing is expected: `_probe` looks
        return profit / total, rows / total

    def _probe(self, prospects: Row[Prospect], sittings: list[Sitting], plain_s: float) -> None:
        """Spend what probing may cost on those that have sat out longest; newcomers get one look each."""
        self._allowance_s = min(self._allowance_s + PROBE_SHARE * plain_s, 4 * plain_s)
        idle = [i for i, sitting in enumerate(sittings) if sitting is Sitting.NO_GAIN]
        already = len(sittings) - len(idle)
        share_s = plain_s / len(prospects)  # of a round that a request may call its own
        looks = 0
        for i in sorted(idle, key=lambda i: prospects[i].outlook.last_draft):
            prospect = prospects[i]
            if self._class_count[prospect.outlook.band] < ENOUGH:
                if looks < LOOKS:
                    looks += 1
                    sittings[i] = Sitting.PROBE
                    already += 1
                continue
            step_s = self.cost.draft_s(already + 1, prospect.context) - self.cost.draft_s(already, 0)
            step_s += self.cost.absorb_s(prospect.behind + 1)
            newcomer = prospect.outlook.last_draft < 0
            if not newcomer or step_s > FIRST_LOOK * prospect.remaining * share_s:
                if step_s > self._allowance_s or prospect.outlook.last_draft + REVIEW > self._round:
                    break
                self._allowance_s -= step_s
            sittings[i] = Sitting.PROBE
            already += 1
