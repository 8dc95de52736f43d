"""Replays arrivals through the very same planner and policies, against costs and acceptance given as numbers.

For hardware that is not there: the clock is the cost table's. Pages are not simulated: a request enters when a place
is free, and its prompt is read in the scheduler's chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from engine.config import EngineConfig
from engine.schedule.acceptance import Acceptance, Drawn, Trace
from engine.schedule.cost import CostTable, LiveCost, Work
from engine.schedule.finished import FinishedRound
from engine.schedule.loads import Arrival
from engine.schedule.planner import Planner
from engine.schedule.policies import make_policy
from engine.schedule.record import RoundRecord
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


@dataclass(slots=True)
class Outcome:
    """What a simulation came to."""

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0  # decode rounds of single requests
    decoded: int = 0  # tokens of these; a request's first one comes out of its prompt
    steady_s: float = 0.0  # while every place was taken and others waited
    steady_tokens: int = 0
    verified: int = 0
    drafted_rounds: int = 0
    latency_s: list[float] = field(default_factory=list)  # a request, from arrival to its last token
    rates: list[float] = field(default_factory=list)  # tokens a second of each request, from its first on
    records: list[RoundRecord] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def steady_tokens_per_s(self) -> float:
        """Without the beginning and the end, where places are empty."""
        return self.steady_tokens / self.steady_s if self.steady_s else self.tokens_per_s

    @property
    def mean_accepted_length(self) -> float:
        return self.decoded / self.rounds if self.rounds else 0.0


@dataclass(slots=True)
class _Served:
    """When things happened to a request."""

    arrived_s: float
    first_s: float = 0.0  # its first token; 0: not yet


class _Laps(dict[str, float]):
    """Stands in for the stopwatch: a stage that did not run took no time."""

    def __missing__(self, name: str) -> float:
        return 0.0


class Simulator:
    """One server on hardware described by `truth`.

    Args:
        truth: what rounds take; the planner starts from `believed`, by default the same.
        profiles: acceptance by kind of request, as parameters or as recorded; each as long as the block.
        between_s: seconds from the end of a round to the start of the next, which no table of rounds knows.
        noise: relative standard deviation of a round's seconds.
        stalls: share of rounds that take five times as long.
        certainty: the target's largest probability in a decode round, by kind of request; () where it is not known.
    """

    def __init__(
        self,
        truth: CostTable,
        profiles: tuple[Acceptance | Trace, ...],
        policy: str = "auto",
        draft_tokens: int | None = None,
        max_running: int = 64,
        believed: CostTable | None = None,
        noise: float = 0.0,
        stalls: float = 0.0,
        seed: int = 0,
        threshold: float = 0.3,
        between_s: float = 0.0,
        certainty: tuple[float, ...] = (),
    ) -> None:
        config = self._config = EngineConfig(
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
        self._sources: list[Drawn | Trace] = [Drawn(p) if isinstance(p, Acceptance) else p for p in profiles]
        self.between_s = between_s
        self.certainty = certainty

    def run(self, arrivals: Iterable[Arrival], keep_records: int = 0) -> Outcome:
        """Serve everything; the last `keep_records` decision records are kept."""
        coming = sorted(arrivals, key=lambda a: a.at_s)
        coming.reverse()
        running: list[Sequence] = []
        served: dict[Sequence, _Served] = {}
        outcome = Outcome()
        start = self.now
        full = False  # whether every place has been decoding: from then on, while others wait, the load is steady
        while coming or running:
            if not running and coming[-1].at_s > self.now - start:
                self.now = start + coming[-1].at_s
            while coming and len(running) < self.max_running and coming[-1].at_s <= self.now - start:
                arrival = coming.pop()
                sequence = self._enter(arrival, len(served), len(running) + len(coming))
                running.append(sequence)
                served[sequence] = _Served(start + arrival.at_s)
            tokens, began = outcome.tokens, self.now
            finished = self._round(running, len(coming), outcome)
            full = full or (len(running) == self.max_running and all(s.phase is Phase.DECODE for s in running))
            if coming and full:
                outcome.steady_s += self.now - began
                outcome.steady_tokens += outcome.tokens - tokens
            if keep_records:
                outcome.records.append(finished.record())
                del outcome.records[:-keep_records]
            for sequence in running:
                if sequence.output_length and not served[sequence].first_s:
                    served[sequence].first_s = self.now
            for sequence in [s for s in running if s.output_length >= s.request.end.max_tokens]:
                running.remove(sequence)
                past = served[sequence]
                outcome.latency_s.append(self.now - past.arrived_s)
                if sequence.output_length > 1:
                    outcome.rates.append((sequence.output_length - 1) / max(self.now - past.first_s, 1e-9))
                del self._kinds[sequence]
        outcome.seconds = self.now - start
        return outcome

    def _enter(self, arrival: Arrival, number: int, running: int) -> Sequence:
        request = Request(
            str(number), (0,) * arrival.prompt, EndConditions(arrival.tokens), Sampling(), priority=arrival.priority
        )
        sequence = Sequence(request, 0, Verification.REJECTION, [0] * arrival.prompt, number, Phase.PREFILL)
        sequence.prompt_length = arrival.prompt
        load = min(running + 1, self.max_running)
        sequence.followed = self.planner.follows(sequence, self.policy, load, arrival.prompt)
        self._kinds[sequence] = arrival.acceptance
        return sequence

    def _round(self, running: list[Sequence], waiting: int, outcome: Outcome) -> FinishedRound:
        decoding = [s for s in running if s.phase is Phase.DECODE]
        again = self.planner.returning
        if again in decoding and not waiting:
            self._begin_again(again)
            decoding.remove(again)
        chunks = self._chunks(running, bool(decoding))
        prompt_rows = sum(row.count for row in chunks)
        places = self.planner.who_drafts(decoding, self.block_size, prompt_rows, self.policy, len(running))
        block, lengths = None, {}
        truth = np.zeros((0, self.block_size))
        if places:
            block, truth = self._draft([decoding[place] for place in places])
            lengths = dict(zip(map(id, block.sequences), self.planner.lengths(block, self.policy), strict=True))
        kept = dict.fromkeys(map(id, decoding), 0)
        for row, place in enumerate(places):
            length = lengths[id(decoding[place])]
            lucky = self._random.random(length) < truth[row, :length]
            kept[id(decoding[place])] = int(np.argmin([*lucky, False]))
        rows = []
        slots = truth.shape[1]
        for place, sequence in enumerate(decoding):
            length = lengths.get(id(sequence), 0)
            drafted = slots if place in places else 0
            rows.append(PlanRow(sequence, sequence.kv_length, 1 + length, length, True, drafted))
        rows += chunks
        accepted = tuple(kept.get(id(row.sequence), 0) for row in rows)
        caught_up, absorbed = self._absorb(decoding, set(places), accepted)
        absorbed += sum(chunk.count for chunk in chunks if chunk.sequence.followed)
        work = _work(rows, len(decoding), prompt_rows, [decoding[place] for place in places], absorbed)
        work = replace(work, draft_share=slots / self.block_size, caught_up=caught_up)
        times = self.truth.times(work)
        factor = max(1 + self._noise * float(self._random.standard_normal()), 0.2)
        if self._random.random() < self._stalls:
            factor *= 5.0
        self.now += times.total * factor + self.between_s
        laps = _Laps(draft=times.draft * factor, verify=times.verify * factor, absorb=times.absorb * factor)
        laps["between"] = self.between_s
        nothing: tuple[tuple[()], ...] = ((),) * len(rows)
        known = None
        if self.certainty:
            known = np.array([self.certainty[self._kinds[row.sequence]] for row in rows if row.needs_token])
        verdict = Verdict(accepted, (0,) * len(rows), None, _NO_BATCH, nothing, (False,) * len(rows), known)
        finished = self.planner.learn(
            StepPlan(tuple(rows)), block, verdict, waiting, absorbed, laps, caught_up=caught_up
        )
        for sequence, count in zip(decoding, accepted, strict=False):
            self._commit(sequence, min(count + 1, sequence.request.end.max_tokens - sequence.output_length), outcome)
            outcome.rounds += 1
            outcome.decoded += len(sequence.tokens) - 1 - sequence.kv_length
            sequence.kv_length = len(sequence.tokens) - 1
            outcome.verified += lengths.get(id(sequence), 0)
        for chunk in chunks:
            chunk.sequence.kv_length += chunk.count
            if chunk.sequence.followed:
                chunk.sequence.absorbed = chunk.sequence.kv_length
            if chunk.needs_token:
                chunk.sequence.phase = Phase.DECODE
                self._commit(chunk.sequence, 1, outcome)
        outcome.drafted_rounds += len(places)
        return finished

    def _begin_again(self, sequence: Sequence) -> None:
        """Its features were not kept, and drafting pays by now."""
        self.planner.leaves(sequence)
        sequence.followed, sequence.phase = True, Phase.PREFILL
        sequence.kv_length = sequence.absorbed = 0

    def _commit(self, sequence: Sequence, tokens: int, outcome: Outcome) -> None:
        sequence.tokens += [0] * tokens
        outcome.tokens += tokens

    def _chunks(self, running: list[Sequence], decoding: bool) -> list[PlanRow]:
        """Prompt rows of this round, bounded while others decode, as the scheduler does."""
        budget = self._config.prefill_chunk if decoding else self._config.max_batch_tokens
        rows = []
        for sequence in running:
            if sequence.phase is Phase.PREFILL and budget:
                left = len(sequence.tokens) - sequence.kv_length
                count = min(left, budget)
                rows.append(PlanRow(sequence, sequence.kv_length, count, 0, needs_token=count == left))
                budget -= count
        return rows

    def _absorb(self, decoding: list[Sequence], drafting: set[int], accepted: tuple[int, ...]) -> tuple[int, int]:
        """Rows that the drafter takes in: what waited for its sequences, and what they commit."""
        waited = rows = 0
        for place, sequence in enumerate(decoding):
            if place in drafting:
                waited += sequence.deferred
                rows += 1 + accepted[place]
                sequence.absorbed += sequence.deferred + 1 + accepted[place]
        return waited, rows

    def _draft(self, sequences: list[Sequence]) -> tuple[DraftBlock, np.ndarray]:
        """A block and the true conditional acceptances [R, L] behind its confidences."""
        whole = np.empty((2, len(sequences), self.block_size))
        for row, sequence in enumerate(sequences):
            source = self._sources[self._kinds[sequence]]
            whole[0, row], whole[1, row] = source.block(sequence.proposals, self._random)
            sequence.proposals += 1
        truth, confidence = whole[:, :, : self.planner.length]
        tokens = torch.zeros(truth.shape, dtype=torch.int64)
        return DraftBlock(tuple(sequences), tokens, torch.from_numpy(confidence).float(), None, None), truth


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
