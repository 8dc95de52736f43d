"""Replays arrivals through the very same planner and policies, against costs and acceptance given as numbers.

For hardware that is not there: the clock is the cost table's. Pages are not simulated; a request enters when
a place is free and pays for its prompt as one chunk of rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.config import EngineConfig
from engine.schedule.cost import CostTable, LiveCost, Work
from engine.schedule.planner import Planner
from engine.schedule.policies import make_policy
from engine.schedule.record import RoundRecord, Sitting
from engine.schedule.reliability import logit
from engine.types import (
    Batch,
    DraftBlock,
    EndConditions,
    Phase,
    PlanRow,
    Request,
    Sampling,
    Sequence,
    StepPlan,
    Verdict,
    Verification,
)

_NONE = torch.zeros(0, dtype=torch.int64)
_NO_BATCH = Batch(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often drafted tokens survive.

    Args:
        conditional: by position, P(accepted | all before accepted), averaged over blocks.
        spread: how much blocks differ, as the standard deviation of their logits; confidences see all of it.
        bias: what the drafter's confidences are off by, in logits: 0 is calibrated, above is overconfident.
    """

    conditional: tuple[float, ...]
    spread: float = 1.5
    bias: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the replayed load."""

    at_s: float
    prompt: int  # tokens
    tokens: int  # to generate
    acceptance: int = 0  # which of the profiles it follows
    priority: int = 0


@dataclass(slots=True)
class Outcome:
    """What a simulation came to."""

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0  # of single requests
    verified: int = 0
    drafted_rounds: int = 0
    latency_s: list[float] = field(default_factory=list)  # a request, from arrival to its last token
    rates: list[float] = field(default_factory=list)  # tokens a second of each request while it ran
    records: list[RoundRecord] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_accepted_length(self) -> float:
        return self.tokens / self.rounds if self.rounds else 0.0


class _Laps(dict[str, float]):
    """Stands in for the stopwatch: a stage that did not run took no time."""

    def __missing__(self, name: str) -> float:
        return 0.0


class Simulator:
    """One server on hardware described by `truth`.

    Args:
        truth: what rounds take; the planner starts from `believed`, by default the same.
        profiles: acceptance by kind of request; each as long as the block.
        noise: relative standard deviation of a round's seconds.
        stalls: share of rounds that take five times as long.
    """

    def __init__(
        self,
        truth: CostTable,
        profiles: tuple[Acceptance, ...],
        policy: str = "auto",
        draft_tokens: int | None = None,
        max_running: int = 64,
        believed: CostTable | None = None,
        noise: float = 0.0,
        stalls: float = 0.0,
        seed: int = 0,
        threshold: float = 0.3,
    ) -> None:
        config = EngineConfig(
            model="simulated",
            policy=policy,
            draft_tokens=draft_tokens,
            max_running=max_running,
            max_batch_tokens=max(1024, 10 * max_running),
            confidence_threshold=threshold,
        )
        self.truth = truth
        self.profiles = profiles
        self.block_size = len(profiles[0].conditional)
        self.policy = make_policy(config)
        self.max_running = max_running
        self.now = 0.0
        cost = LiveCost(believed or truth, config.max_batch_tokens)
        self.planner = Planner(cost, self.block_size, True, lambda: self.now)
        self._noise, self._stalls = noise, stalls
        self._random = np.random.default_rng(seed)
        self._kinds: dict[Sequence, int] = {}
        self._centers = [self._center(profile) for profile in profiles]

    def _center(self, profile: Acceptance) -> np.ndarray:
        """Logits around which blocks spread so that their mean probability is the profile's."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(21)
        weights = weights / weights.sum()
        low, high = np.full(self.block_size, -20.0), np.full(self.block_size, 20.0)
        for _ in range(50):
            middle = (low + high) / 2
            mean = (weights / (1 + np.exp(-(middle[:, None] + profile.spread * nodes)))).sum(-1)
            low = np.where(mean < profile.conditional, middle, low)
            high = np.where(mean < profile.conditional, high, middle)
        return low

    def run(self, arrivals: Iterable[Arrival], keep_records: int = 0) -> Outcome:
        """Serve everything; the last `keep_records` decision records are kept."""
        coming = sorted(arrivals, key=lambda a: a.at_s)
        coming.reverse()
        running: list[Sequence] = []
        began: dict[Sequence, tuple[float, float]] = {}
        outcome = Outcome()
        start = self.now
        while coming or running:
            if not running and coming[-1].at_s > self.now - start:
                self.now = start + coming[-1].at_s
            prompt_rows = 0
            while coming and len(running) < self.max_running and coming[-1].at_s <= self.now - start:
                arrival = coming.pop()
                sequence = self._enter(arrival, len(began))
                running.append(sequence)
                began[sequence] = (start + arrival.at_s, self.now)
                prompt_rows += arrival.prompt
            record = self._round(running, prompt_rows, len(coming), outcome)
            if keep_records:
                outcome.records.append(record)
                del outcome.records[:-keep_records]
            for sequence in [s for s in running if s.output_length >= s.request.end.max_tokens]:
                running.remove(sequence)
                arrived, entered = began[sequence]
                outcome.latency_s.append(self.now - arrived)
                outcome.rates.append(sequence.output_length / max(self.now - entered, 1e-9))
                del self._kinds[sequence]
        outcome.seconds = self.now - start
        return outcome

    def _enter(self, arrival: Arrival, number: int) -> Sequence:
        request = Request(
            str(number), (0,) * arrival.prompt, EndConditions(arrival.tokens), Sampling(), priority=arrival.priority
        )
        sequence = Sequence(request, 0, Verification.REJECTION, [0] * arrival.prompt, number, Phase.DECODE)
        sequence.prompt_length = sequence.kv_length = arrival.prompt
        self._kinds[sequence] = arrival.acceptance
        return sequence

    def _round(self, running: list[Sequence], prompt_rows: int, waiting: int, outcome: Outcome) -> RoundRecord:
        limits = [
            0 if self.policy is None else min(self.block_size, s.request.end.max_tokens - s.output_length - 1)
            for s in running
        ]
        sittings = self.planner.who_drafts(running, limits, prompt_rows, self.policy)
        drafts = (Sitting.DRAFTS, Sitting.ASKED, Sitting.PROBE)
        places = [place for place, sitting in enumerate(sittings) if sitting in drafts]
        block, lengths = None, {}
        truth = np.zeros((0, self.block_size))
        if places:
            block, truth = self._draft([running[place] for place in places])
            lengths = self.planner.lengths(block, [limits[place] for place in places], self.policy)
        kept = dict.fromkeys(map(id, running), 0)
        for row, place in enumerate(places):
            length = lengths[id(running[place])]
            lucky = self._random.random(length) < truth[row, :length]
            kept[id(running[place])] = int(np.argmin([*lucky, False]))
        rows = []
        for place, sequence in enumerate(running):
            length = lengths.get(id(sequence), 0)
            drafted = self.block_size if place in places else 0
            rows.append(PlanRow(sequence, sequence.kv_length, 1 + length, length, True, drafted))
        if prompt_rows:
            rows.append(PlanRow(_prompt(prompt_rows), 0, prompt_rows))
        accepted = tuple(kept.get(id(row.sequence), 0) for row in rows)
        absorbed = self._absorb(running, set(places), accepted)
        work = _work(rows, len(running), prompt_rows, [running[place] for place in places], absorbed)
        times = self.truth.times(work)
        factor = max(1 + self._noise * float(self._random.standard_normal()), 0.2)
        if self._random.random() < self._stalls:
            factor *= 5.0
        self.now += times.total * factor
        laps = _Laps(draft=times.draft * factor, verify=times.verify * factor, absorb=times.absorb * factor)
        verdict = Verdict(accepted, (0,) * len(rows), None, _NO_BATCH, ((),) * len(rows), (False,) * len(rows))
        record = self.planner.learn(StepPlan(tuple(rows)), block, verdict, waiting, absorbed, laps)
        for sequence, count in zip(running, accepted, strict=False):
            grown = min(count + 1, sequence.request.end.max_tokens - sequence.output_length)
            sequence.tokens += [0] * grown
            sequence.kv_length += grown
            outcome.tokens += grown
            outcome.rounds += 1
            outcome.verified += lengths.get(id(sequence), 0)
        outcome.drafted_rounds += len(places)
        return record

    def _absorb(self, running: list[Sequence], drafting: set[int], accepted: tuple[int, ...]) -> int:
        """Rows that the drafter takes in: what its sequences commit, and what waited for them."""
        rows = 0
        for place, sequence in enumerate(running):
            if place in drafting:
                rows += 1 + accepted[place] + sequence.deferred
                sequence.deferred = 0
            else:
                sequence.deferred += 1
        return rows

    def _draft(self, sequences: list[Sequence]) -> tuple[DraftBlock, np.ndarray]:
        """A block and the true conditional acceptances [R, γ] behind its confidences."""
        kinds = [self._kinds[sequence] for sequence in sequences]
        spread = np.array([self.profiles[kind].spread for kind in kinds])[:, None]
        bias = np.array([self.profiles[kind].bias for kind in kinds])[:, None]
        logits = np.stack([self._centers[kind] for kind in kinds])
        logits = logits + spread * self._random.standard_normal(logits.shape)
        truth = 1 / (1 + np.exp(-logits))
        confidence = 1 / (1 + np.exp(-(logit(truth) + bias)))
        tokens = torch.zeros(len(sequences), self.block_size, dtype=torch.int64)
        return DraftBlock(tuple(sequences), tokens, torch.from_numpy(confidence).float(), None, None), truth


def _prompt(rows: int) -> Sequence:
    """A prompt being read beside the decoding ones."""
    request = Request("prompt", (0,), EndConditions(1))
    return Sequence(request, 0, Verification.REJECTION, [0] * rows, 0, Phase.PREFILL)


def _work(rows: list[PlanRow], decoding: int, prompt_rows: int, drafting: list[Sequence], absorbed: int) -> Work:
    decode = rows[:decoding]
    return Work(
        requests=decoding,
        rows=sum(row.count for row in decode),
        context=sum(row.start for row in decode),
        row_context=sum(row.start * row.draft_length for row in decode),
        prefill=prompt_rows,
        drafting=len(drafting),
        draft_context=sum(s.kv_length for s in drafting),
        absorbed=absorbed,
    )


def closed_load(concurrency: int, requests: int, tokens: int, kinds: int = 1, seed: int = 0) -> list[Arrival]:
    """`requests` requests that all wait from the start: with `max_running` = concurrency, as many always run."""
    generator = random.Random(seed)
    return [Arrival(0.0, 64, tokens, generator.randrange(kinds)) for _ in range(max(requests, concurrency))]


def poisson_load(rate: float, seconds: float, tokens: int, kinds: int = 1, seed: int = 0) -> list[Arrival]:
    """Requests at random times, `rate` a second on average."""
    generator = random.Random(seed)
    found, now = [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        found.append(Arrival(now, 64, tokens, generator.randrange(kinds)))
    return found
