"""The scheduler's memory: turns sequences into candidates, blocks into lengths, finished rounds into knowledge.

Everything it knows comes from past rounds; of the present block it reads confidences, in the order that the policies
keep (`lengths.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass, field, replace

import numpy as np

from engine.schedule.cost import LiveCost, Times, Work
from engine.schedule.drafting import DraftGate, Outlook, Prospect
from engine.schedule.lengths import Candidate
from engine.schedule.policies import AutoLengths, LengthPolicy, Round
from engine.schedule.record import RequestRecord, RoundRecord, Sitting, Stop
from engine.schedule.reliability import Reliability, band
from engine.stopwatch import Laps
from engine.types import DraftBlock, Sequence, SpeculationMode, StepPlan, Verdict, Verification

HEAVIEST = 4.0  # the most that priority, and that lateness, multiply a request's tokens with
_RATE_S = 1.0  # seconds over which a request's tokens a second are averaged


@dataclass(slots=True)
class _Present:
    """The round in the making."""

    decoding: list[Sequence] = field(default_factory=list)
    sittings: dict[Sequence, Sitting] = field(default_factory=dict)
    weights: dict[Sequence, float] = field(default_factory=dict)
    rows: dict[Sequence, int] = field(default_factory=dict)  # of the block
    survival: list[list[float]] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)  # of the handed confidences
    limits: list[int] = field(default_factory=list)
    plain: Work = field(default_factory=Work)
    price: float = 0.0
    stop: Stop = Stop.NOBODY


class Planner:
    """Who drafts, and how much of each block is verified.

    Args:
        clock: seconds, for requests' tokens a second.
    """

    def __init__(
        self,
        cost: LiveCost,
        block_size: int,
        has_confidence: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cost = cost
        self.gate = DraftGate(cost, max(block_size, 1))
        self.reliability = Reliability(max(block_size, 1), has_confidence)
        self.block_size = block_size
        self.clock = clock
        self.decay = 0.6
        self.rounds = 0
        self._policy = "plain"
        self._outlooks: dict[Sequence, Outlook] = {}
        self._now = _Present()

    def who_drafts(
        self, decoding: list[Sequence], limits: Row[int], prefill: int, policy: LengthPolicy | None
    ) -> list[Sitting]:
        """One sitting a decoding sequence; `limits` are the draft tokens that each could use."""
        self._now = now = _Present(decoding)
        self._policy = "plain" if policy is None else policy.name
        self._keep_books(decoding)
        now.weights = {s: weight(s, self._outlooks[s].rate) for s in decoding}
        now.plain = Work(
            requests=len(decoding),
            rows=len(decoding),
            context=sum(s.kv_length for s in decoding),
            prefill=prefill,
        )
        sittings = [_wish(s, limit, policy) for s, limit in zip(decoding, limits, strict=True)]
        if isinstance(policy, AutoLengths):
            self._judge(decoding, limits, sittings)
        now.sittings = dict(zip(decoding, sittings, strict=True))
        return sittings

    def _keep_books(self, decoding: list[Sequence]) -> None:
        """An outlook for everybody who decodes, none for anybody else."""
        books = self._outlooks
        for sequence in decoding:
            if sequence not in books:
                books[sequence] = self.gate.enter(band(sequence.request.sampling, sequence.verification))
        if len(books) > len(decoding):
            stay = set(decoding)
            for sequence in [s for s in books if s not in stay]:
                self.gate.leave(books.pop(sequence))

    def _judge(self, decoding: list[Sequence], limits: Row[int], sittings: list[Sitting]) -> None:
        """Let the gate decide about those that leave it open; changes `sittings`."""
        now, prospects, places = self._now, [], []
        for place, sequence in enumerate(decoding):
            if sittings[place] is Sitting.ASKED and sequence.request.speculation.mode is SpeculationMode.AUTO:
                remaining = sequence.request.end.max_tokens - sequence.output_length
                prospects.append(
                    Prospect(
                        self._outlooks[sequence],
                        now.weights[sequence],
                        limits[place],
                        sequence.kv_length,
                        sequence.deferred,
                        remaining,
                    )
                )
                places.append(place)
        batch = tuple(id(prospect.outlook) for prospect in prospects)
        # A prompt in the round makes tokens dear for once, but a second is worth what it is worth in other rounds.
        plain = replace(now.plain, prefill=0)
        draw = self.gate.choose(prospects, plain, sum(now.weights.values()), batch)
        now.price = draw.price
        for place, sitting in zip(places, draw.sittings, strict=True):
            sittings[place] = sitting

    def sits_out(self, sequence: Sequence, why: Sitting) -> None:
        """A sequence that was to draft cannot."""
        self._now.sittings[sequence] = why

    def lengths(self, block: DraftBlock | None, limits: Row[int], policy: LengthPolicy | None) -> dict[int, int]:
        """Verified lengths by id(sequence)."""
        now = self._now
        if block is None or policy is None:
            return {}
        outlooks = [self._outlooks[s] for s in block.sequences]
        if block.confidence is None:
            handed = np.repeat(np.array([[o.acceptance] for o in outlooks]), self.block_size, axis=1)
            raw = None
        else:
            handed = block.confidence.cpu().numpy()
            raw = handed.tolist()
        survival, logits = self.reliability.correct(handed, np.array([o.band for o in outlooks]))
        now.survival, now.logits, now.limits = survival.tolist(), logits.tolist(), list(limits)
        now.rows = {s: row for row, s in enumerate(block.sequences)}
        per_token = self.cost.table.row_context_s * self.cost.speed
        candidates = [
            Candidate(
                None if raw is None else raw[row],
                limits[row],
                sequence.request.speculation,
                now.survival[row],
                now.weights[sequence],
                per_token * sequence.kv_length,
                sequence.verification is Verification.COUPLED or sequence.request.sampling.temperature == 0,
            )
            for row, sequence in enumerate(block.sequences)
        ]
        plain = now.plain
        work = Work(
            plain.requests,
            plain.rows,
            plain.context,
            0,
            plain.prefill,
            len(block.sequences),
            sum(s.kv_length for s in block.sequences),
            len(block.sequences),
        )
        choice = policy.choose(candidates, Round(work, self.cost, sum(now.weights.values()), now.price, self.decay))
        now.stop = choice.stop
        return dict(zip(map(id, block.sequences), choice.lengths, strict=True))

    def learn(
        self, plan: StepPlan, block: DraftBlock | None, verdict: Verdict, waiting: int, absorbed: int, watch: Laps
    ) -> RoundRecord:
        """Take in a finished round.

        Args:
            waiting: requests in the queue.
            absorbed: rows that the drafter took in.
            watch: with laps decide, draft, verify, absorb and commit.
        """
        now, began = self._now, self.clock()
        self.rounds += 1
        requests: list[RequestRecord] = []
        predicted = 0.0
        row_context = draft_context = prefill = 0
        for row, accepted in zip(plan.rows, verdict.accepted, strict=True):
            sequence, length = row.sequence, row.draft_length
            sitting = now.sittings.get(sequence)
            if sitting is None:
                prefill += row.count
                continue
            outlook = self._outlooks[sequence]
            curve: tuple[float, ...] = ()
            place = now.rows.get(sequence)
            if place is not None:
                curve = tuple(now.survival[place][: now.limits[place]])
                predicted += sum(curve[:length])
                draft_context += row.start
                row_context += length * row.start
                if length:
                    self.reliability.observe(outlook.band, now.logits[place], length, accepted)
                    outlook.saw(length, accepted)
            _follow_rate(outlook, accepted + 1, began)
            name, weight = sequence.request.request_id, now.weights[sequence]
            requests.append(RequestRecord(name, sitting, weight, row.start, row.drafted, length, accepted, curve))
        if block is not None:
            self._saw(block)
        self.reliability.learn()
        verified, accepts = sum(r.verified for r in requests), sum(r.accepted for r in requests)
        work = Work(
            requests=len(requests),
            rows=len(requests) + verified,
            context=sum(r.context for r in requests),
            row_context=row_context,
            prefill=prefill,
            drafting=len(block.sequences) if block is not None else 0,
            draft_context=draft_context,
            absorbed=absorbed,
        )
        decide_s = watch["decide"] + self.clock() - began
        times = Times(watch["draft"], watch["verify"] + watch["commit"] + decide_s, watch["absorb"])
        expected = self.cost.times(work)
        self.cost.observe(work, times)
        return RoundRecord(
            round=self.rounds,
            policy=self._policy,
            running=len(plan.rows),
            waiting=waiting,
            prefill_rows=prefill,
            candidates=sum(len(r.survival) for r in requests),
            verified=verified,
            predicted_accepts=predicted,
            accepted=accepts,
            tokens=len(requests) + accepts,
            predicted_s=expected.total,
            measured_s=times.total,
            draft_s=times.draft,
            verify_s=times.verify,
            absorb_s=times.absorb,
            decide_s=decide_s,
            price=now.price,
            stop=now.stop,
            requests=tuple(requests),
        )

    def _saw(self, block: DraftBlock) -> None:
        """Remember the block's survivals, and how fast they fall."""
        known = [(self._outlooks[s], now) for s, now in zip(block.sequences, self._now.survival, strict=True)]
        curves = np.array([curve for _, curve in known])
        self.gate.saw([outlook for outlook, _ in known], curves)
        if self.block_size > 1:
            ratio = float(np.mean(curves[:, 1:] / np.maximum(curves[:, :-1], 1e-6)))
            self.decay += 0.02 * (ratio - self.decay)


def weight(sequence: Sequence, rate: float) -> float:
    """What one of the request's tokens counts: doubled every four steps of priority, more when it runs too slowly."""
    request = sequence.request
    most = math.log2(HEAVIEST)  # bounds the exponent: any 32-bit number may be a priority
    factor = 2.0 ** min(max(request.priority / 4, -most), most)
    if request.min_tokens_per_s > 0 and 0 < rate < request.min_tokens_per_s:
        factor *= min(request.min_tokens_per_s / rate, HEAVIEST)
    return factor


def _wish(sequence: Sequence, limit: int, policy: LengthPolicy | None) -> Sitting:
    if policy is None or sequence.request.speculation.mode is SpeculationMode.OFF:
        return Sitting.OFF
    return Sitting.ASKED if limit else Sitting.NO_ROOM


def _follow_rate(outlook: Outlook, tokens: int, clock: float) -> None:
    """Tokens a second over about the last second."""
    passed = clock - outlook.last_round_s
    if outlook.last_round_s and passed > 0:
        share = passed / (passed + _RATE_S) if outlook.rate else 1.0
        outlook.rate += share * (tokens / passed - outlook.rate)
    outlook.last_round_s = clock
