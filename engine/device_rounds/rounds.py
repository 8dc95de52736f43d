"""The host's side of rounds on the device: launch round i, then read and commit round i − 1.

The host never waits inside a round: it knows of each sequence what the round before the last left, grants pages for the
most that two rounds may add, and takes out who has ended one round late; what ran for it since is thrown away. Only
sequences that need nothing of the host from round to round are seated: no penalties, biases, logprobs or stop ids that
are masked for now. As long as somebody needs more, or a prompt waits that could enter, everything under way is read
and the ordinary path goes on from there: prompts are not run between replays, and nobody copies (prompt lookup).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from engine.backlog import Backlog
from engine.batch import build_batch
from engine.commit import Committer
from engine.device_rounds.graphs import CaptureLimits, CaptureReport, graphs_for
from engine.device_rounds.round import DeviceRound, Size
from engine.device_rounds.seating import Seating
from engine.device_rounds.sizing import ASKED, Sizing, Wish, staircase, wish
from engine.device_rounds.staging import Staging
from engine.device_rounds.state import Edits, Fate, Found, RoundState
from engine.drafters.drafter import Drafter
from engine.drafters.dspark import DSparkDrafter
from engine.models.decoder import DecoderModel
from engine.page_groups import pages_for
from engine.schedule.admission import order
from engine.schedule.cost import Work
from engine.schedule.finished import FinishedRound
from engine.schedule.late import LateRounds
from engine.schedule.policies import AutoLengths, LengthPolicy, RelayedLengths, StaticLengths
from engine.schedule.scheduler import Scheduler
from engine.types import DraftBlock, Phase, PlanRow, Sequence, StepPlan, TokenDelta, Verdict

REFRESH = 16  # rounds between two looks at weights and at what confidences are worth


@dataclass(frozen=True, slots=True)
class Launched:
    """A round under way."""

    size: Size
    seated: tuple[tuple[Sequence, int, Wish], ...]
    turn: int  # of the buffers
    waiting: int
    expected_s: float
    decide_s: float
    follows: bool  # right behind another: the time between their results is its own


def fits(target: DecoderModel, drafter: Drafter | None) -> bool:
    """Whether rounds of this target and drafter can stay on the device."""
    if not all(layer.plain for layer in target.layers):
        return False
    return drafter is None or (isinstance(drafter, DSparkDrafter) and drafter.heads.step is None)


@contextmanager
def paused(rounds: DeviceRounds | None) -> Iterator[None]:
    """Meanwhile the host runs every round."""
    if rounds is None:
        yield
        return
    rounds.paused = True
    try:
        yield
    finally:
        rounds.paused = False


class DeviceRounds:
    """Takes the place of `Engine.step`'s line as long as everybody who runs fits.

    Args:
        scratch_page: a page that the caches have beyond the pool's.
        add: takes decision records.
    """

    def __init__(
        self,
        target: DecoderModel,
        drafter: DSparkDrafter | None,
        scheduler: Scheduler,
        committer: Committer,
        waiting: list[Sequence],
        backlog: Backlog | None,
        scratch_page: int,
        add: Callable[[FinishedRound], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler, self.committer, self.backlog = scheduler, committer, backlog
        self.running, self.waiting = committer.running, waiting
        self.drafter = drafter
        self.block = drafter.block_size if drafter is not None else 0
        self.confident = drafter is not None and drafter.has_confidence
        most, longest = scheduler.config.max_running, committer.max_length
        self.state = RoundState(most, pages_for(longest), self.block, scratch_page, target.device)
        self.staging = Staging(self.state)
        self.seating = Seating(self.state, committer.pages)
        committer.give_back = self.seating.give_back
        self.graphs = graphs_for(DeviceRound(target, drafter, self.state).run, target.device)
        sizes = staircase(most, self.block, scheduler.config.max_batch_tokens)
        self.sizing = Sizing(sizes, self._guess)
        self.late = LateRounds(scheduler, self.confident)
        self.paused = False
        self.report = CaptureReport()
        self._add, self._clock = add, clock
        self._flights: deque[Launched] = deque()
        self._policy: LengthPolicy | None = None
        self._wishes: dict[Sequence, Wish] = {}
        self._since_refresh = 0
        self._last_read = 0.0
        self._nothing = build_batch(StepPlan(()), None, torch.device("cpu"))

    @property
    def flying(self) -> bool:
        """Whether rounds are under way."""
        return bool(self._flights)

    @property
    def held(self) -> list[list[int]]:
        """Pages that belong to no sequence any more and may still be written."""
        return [leaver.pages for leaver in self.seating.leavers]

    def capture(self, limits: CaptureLimits | None = None) -> CaptureReport:
        """Capture a graph of every size, and learn what each takes. Nobody may be running."""
        assert not self.running and not self._flights
        self._send(Edits(self.state))
        self.report = self.graphs.capture(self.sizing.sizes, limits or CaptureLimits())
        for size, seconds in self.report.replay_s.items():
            self.sizing.measured(size, seconds)
        return self.report

    def step(self) -> tuple[list[TokenDelta], bool]:
        """Launch a round and read the one before: its messages, and True. False: the ordinary path has to go on."""
        began, policy = self._clock(), self.scheduler.policy
        if not self._may_launch(policy):
            return self.drain(), False
        deltas: list[TokenDelta] = []
        if policy is not self._policy or self._sparse():
            deltas = self.drain()
            self._policy = policy
        if not self.running or not self._launch(began):
            return deltas + self.drain(), False
        if len(self._flights) > 1:
            deltas += self._read()
        return deltas, True

    def drain(self) -> list[TokenDelta]:
        """Read everything under way; after that the sequences say all there is."""
        deltas: list[TokenDelta] = []
        while self._flights:
            deltas += self._read()
        self.seating.clear()
        self._wishes.clear()
        return deltas

    def reset(self) -> None:
        """Forget what is under way, once the device is done with it."""
        for launched in self._flights:
            self.staging.read(launched.turn)
            self.seating.finished()
        self._flights.clear()
        self.seating.clear()
        self._wishes.clear()

    def _may_launch(self, policy: LengthPolicy | None) -> bool:
        """Whether everybody who runs fits, nobody could enter, and the policy can do without the host."""
        running, waiting, config = self.running, self.waiting, self.scheduler.config
        if self.paused or not 0 < len(running) <= self.state.seats:
            return False
        if policy is not None and not isinstance(policy, StaticLengths | AutoLengths | RelayedLengths):
            return False
        if waiting and len(running) < config.max_running:
            tokens = len(min(waiting, key=order).tokens) + 1
            if self.committer.pages.fits(tokens, 0, len(running), config.prefill_chunk):
                return False
        return all(sequence in self.seating.seats or _needs_nobody(sequence) for sequence in running)

    def _sparse(self) -> bool:
        """Whether those who stayed sit so far apart that they had better sit down anew."""
        seats = self.seating.seats
        return bool(seats) and 2 * self.sizing.seats(len(seats)) <= self.sizing.seats(self.seating.needed)

    def _launch(self, began: float) -> bool:
        """Seat newcomers, grant pages, choose a size, run it. False, and nothing ran, where pages are short."""
        state, seating, policy = self.state, self.seating, self._policy
        edits = Edits(state)
        self.late.attend(list(self.running), policy)
        newcomers = [sequence for sequence in self.running if sequence not in seating.seats]
        if newcomers and self.backlog is not None:
            self.backlog.catch_up([s for s in newcomers if s.followed])
        for sequence in newcomers:
            own = wish(sequence, policy, self.scheduler.config, self.block, self.confident)
            assert not own.most or sequence.absorbed == sequence.kv_length, "the drafter's context has holes"
            self._wishes[sequence] = own
            seating.sit(sequence, edits, self._end(sequence), own.most)
        for sequence in seating.seats:
            most = sequence.kv_length + (seating.flying + 1) * (1 + self.block)
            if not seating.grow(sequence, edits, min(most, self._end(sequence))):
                return False
        seated = tuple((sequence, seat, self._wishes[sequence]) for sequence, seat in seating.seats.items())
        self._judge(seated, edits, everybody=bool(newcomers))
        asked = sum(own.most for _, _, own in seated if own.asked)
        willing = sum(own.most for _, _, own in seated if not own.asked)
        tokens = sum(self.late.weight(sequence) for sequence in seating.seats)
        size, budget = self.sizing.choose(seating.needed, tokens, policy, asked, willing)
        edits.spend(budget)
        turn = self._send(edits)
        self.graphs(size)
        self.staging.fetch(turn)
        expected_s, decide_s = self.sizing.seconds(size), self._clock() - began
        follows = bool(self._flights)
        self._flights.append(Launched(size, seated, turn, len(self.waiting), expected_s, decide_s, follows))
        seating.launched += 1
        return True

    def _send(self, edits: Edits) -> int:
        """The edits, those of empty seats too; whose turn it is."""
        self.seating.vacate(edits)
        turn = self.seating.launched % 2
        self.staging.send(edits, turn)
        return turn

    def _judge(self, seated: tuple[tuple[Sequence, int, Wish], ...], edits: Edits, everybody: bool) -> None:
        """What tokens count and confidences are worth, now and then."""
        self._since_refresh += 1
        if not everybody and self._since_refresh < REFRESH:
            return
        self._since_refresh = 0
        for sequence, seat, own in seated:
            if own.most:
                edits.judge(seat, ASKED if own.asked else self.late.weight(sequence), own.threshold)
                edits.correct(seat, self.late.lines(sequence, live=not own.threshold))

    def _read(self) -> list[TokenDelta]:
        """Commit the oldest round under way."""
        launched = self._flights.popleft()
        found, confidence = self.staging.read(launched.turn)
        now = self._clock()
        seconds = now - self._last_read if launched.follows else launched.expected_s
        self._last_read = now
        there = [(s, seat, own) for s, seat, own in launched.seated if s.phase is Phase.DECODE]
        deltas: list[TokenDelta] = []
        if there:
            deltas = self._commit(launched, there, found, confidence, seconds)
        self.seating.finished()
        if launched.follows:
            self.sizing.learn(launched.size, seconds)
        return deltas

    def _commit(
        self,
        launched: Launched,
        there: list[tuple[Sequence, int, Wish]],
        found: np.ndarray,
        confidence: np.ndarray,
        seconds: float,
    ) -> list[TokenDelta]:
        """The round as the ordinary path would have left it, for those who are still there."""
        drafts = launched.size.drafts
        seats = [seat for _, seat, _ in there]
        own = found[:, seats]
        fates, accepted = own[Found.STATE].tolist(), tuple(own[Found.ACCEPTED].tolist())
        assert Fate.IDLE not in fates, "a round passed over a sequence that goes on"
        rows = []
        for (sequence, _, mine), verified, luck in zip(there, own[Found.VERIFIED].tolist(), accepted, strict=True):
            drafted = self.block if drafts and mine.most else 0
            rows.append(PlanRow(sequence, sequence.kv_length, 1 + verified, verified, True, drafted))
            if self.drafter is not None and sequence.followed:
                sequence.absorbed = sequence.kv_length + 1 + luck
        plan = StepPlan(tuple(rows))
        starts = np.array([row.start for row in rows], np.int64)
        block = None
        if drafts:
            tokens = torch.from_numpy(own[len(Found) :].T.copy())
            block = DraftBlock(tuple(sequence for sequence, _, _ in there), tokens, None, None, None)
        verdict = Verdict(
            accepted,
            tuple(own[Found.NEXT].tolist()),
            None,
            self._nothing,
            ((),) * len(rows),
            tuple(fate == Fate.FAILED for fate in fates),
        )
        limits = [min(mine.most, self._end(s) - s.kv_length - 2) for s, _, mine in there]
        deltas = self.committer.apply(plan, block, verdict)
        asked = np.array([mine.asked for _, _, mine in there])
        blocks = None
        drew = np.array([row.drafted > 0 for row in rows])
        if drew.any():
            names = tuple(row.sequence for row in rows if row.drafted)
            most = np.maximum(np.array(limits, np.int64)[drew], 0)
            blocks = self.late.blocks(names, starts[drew], most, confidence[:, seats].T[drew])
            if not asked[drew].all():
                self.sizing.read(self.late.gains(blocks, asked[drew]))
        costs = (launched.waiting, seconds, launched.expected_s, launched.decide_s)
        self._add(self.late.learn(plan, accepted, blocks, asked, *costs))
        return deltas

    def _end(self, sequence: Sequence) -> int:
        """Tokens at which max_tokens or the context ends it."""
        return min(sequence.prompt_length + sequence.request.end.max_tokens, self.committer.max_length)

    def _guess(self, size: Size) -> float:
        """Seconds of a round of this size, were it run by the host."""
        drafting, absorbed = size.seats if size.drafts else 0, size.rows if self.block else 0
        work = Work(requests=size.seats, rows=size.rows, drafting=drafting, absorbed=absorbed)
        return self.scheduler.cost.times(work).total


def _needs_nobody(sequence: Sequence) -> bool:
    """Whether a sequence decodes, and the host is not needed from round to round."""
    request = sequence.request
    masked = request.end.stop_ids and sequence.output_length < request.end.min_tokens
    edits = request.sampling.edits_logits or request.logprobs is not None
    return sequence.phase is Phase.DECODE and not masked and not edits
