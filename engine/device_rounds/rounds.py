"""The host's side of rounds on the device: launch round i, then read and commit round i − 1.

The host never waits inside a round: it knows of each sequence what the round before the last left, grants pages for the
most that two rounds may add, and takes out who has ended one round late; what ran for it since is thrown away. Only
sequences that need nothing of the host from round to round are seated: no penalties, biases, logprobs or stop ids that
are masked for now. As soon as somebody needs more, or pages are short, everything under way is read and the ordinary
path goes on from there (`fitting.py`). Prompts run between two launches (`prompts.py`); nobody copies meanwhile (prompt
lookup).
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.backlog import Backlog
from engine.commit import Committer
from engine.device_rounds.fitting import decides_ahead, needs_nobody
from engine.device_rounds.graphs import CaptureLimits, CaptureReport, graphs_for
from engine.device_rounds.prompts import Prompts
from engine.device_rounds.results import Launched, Results, Seated
from engine.device_rounds.round import DeviceRound, Size
from engine.device_rounds.seating import Seating
from engine.device_rounds.sizing import ASKED, Sizing, Wish, staircase, wish
from engine.device_rounds.staging import Staging
from engine.device_rounds.state import Edits, RoundState
from engine.drafters.dspark import DSparkDrafter
from engine.page_groups import pages_for
from engine.schedule.cost import Work
from engine.schedule.finished import FinishedRound
from engine.schedule.late import LateRounds
from engine.schedule.policies import LengthPolicy
from engine.schedule.scheduler import Scheduler
from engine.types import Phase, Sequence, TokenDelta
from engine.verify import Verifier

SEATS = 256  # at most; where more requests run, the host runs the rounds
REFRESH = 16  # rounds between two looks at weights and at what confidences are worth


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
    """Takes the place of `Engine.step`'s line as long as everybody who decodes fits.

    Args:
        scratch_page: a page that the caches have beyond the pool's.
        add: takes decision records.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: DSparkDrafter | None,
        scheduler: Scheduler,
        committer: Committer,
        waiting: list[Sequence],
        backlog: Backlog | None,
        scratch_page: int,
        add: Callable[[FinishedRound], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler, self.backlog = scheduler, backlog
        self.running, self.waiting = committer.running, waiting
        self.block = drafter.block_size if drafter is not None else 0
        self.confident = drafter is not None and drafter.has_confidence
        target, most = verifier.target, min(scheduler.config.max_running, SEATS)
        self.state = RoundState(most, pages_for(committer.max_length), self.block, scratch_page, target.device)
        self.staging = Staging(self.state)
        self.seating = Seating(self.state, committer.pages)
        committer.give_back = self.seating.give_back
        self.graphs = graphs_for(DeviceRound(target, drafter, self.state).run, target.device)
        self.sizing = Sizing(staircase(most, self.block, scheduler.config.max_batch_tokens), self._guess)
        self.late = LateRounds(scheduler, self.confident)
        self.results = Results(committer, self.late, self.block, add)
        self.prompts = Prompts(scheduler, verifier, committer, backlog, self.late, add, clock)
        self.paused = False
        self.report = CaptureReport()
        self._clock = clock
        self._flights: deque[Launched] = deque()
        self._policy: LengthPolicy | None = None
        self._wishes: dict[int, Wish] = {}  # by seat
        self._since_refresh = 0
        self._budget = 0
        self._last_read = 0.0
        self._disturbed = 0  # rounds to be read whose time is not theirs alone

    @property
    def flying(self) -> bool:
        """Whether rounds are under way."""
        return bool(self._flights)

    @property
    def held(self) -> list[array[int]]:
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
        if not self._launch(began):
            return deltas + self.drain(), False
        if self.waiting or len(self.seating.seats) < len(self.running):
            told = self._run_prompts()
            if told is None:
                return deltas + self.drain(), False
            deltas += told
        if len(self._flights) > 1:
            deltas += self._read()
        return deltas, True

    def drain(self) -> list[TokenDelta]:
        """Read everything under way; after that the sequences say all there is."""
        deltas: list[TokenDelta] = []
        while self._flights:
            deltas += self._read()
        self.seating.clear()
        return deltas

    def reset(self) -> None:
        """Forget what is under way, once the device is done with it."""
        for launched in self._flights:
            self.staging.read(launched.turn)
            self.seating.finished()
        self._flights.clear()
        self.seating.clear()

    def _may_launch(self, policy: LengthPolicy | None) -> bool:
        """Whether somebody decodes, everybody who does fits, and the policy can do without the host."""
        if self.paused or len(self.running) > self.state.seats:
            return False
        if not decides_ahead(policy):
            return False
        decoding = [sequence for sequence in self.running if sequence.phase is Phase.DECODE]
        seats = self.seating.seats
        return bool(decoding) and all(sequence in seats or needs_nobody(sequence) for sequence in decoding)

    def _sparse(self) -> bool:
        """Whether those who stayed sit so far apart that they had better sit down anew."""
        seats = self.seating.seats
        return bool(seats) and 2 * self.sizing.seats(len(seats)) <= self.sizing.seats(self.seating.needed)

    def _launch(self, began: float) -> bool:
        """Seat newcomers, grant pages, choose a size, run it. False, and nothing ran: pages are short, or nobody is
        left."""
        seating, edits = self.seating, Edits(self.state)
        decoding = [sequence for sequence in self.running if sequence.phase is Phase.DECODE]
        if not decoding:
            return False
        self.late.attend(decoding, self._policy)
        newcomers = [sequence for sequence in decoding if sequence not in seating.seats]
        self._seat(newcomers, edits)
        for sequence in seating.seats:
            most = sequence.kv_length + (seating.flying + 1) * (1 + self.block)
            if not seating.grow(sequence, edits, min(most, self.results.end(sequence))):
                return False
        seated = tuple((sequence, seat, self._wishes[seat]) for sequence, seat in seating.seats.items())
        self._judge(seated, edits, everybody=bool(newcomers))
        size, budget = self._size(seated)
        if budget != self._budget:
            edits.spend(budget)
            self._budget = budget
        turn = self._send(edits)
        self.graphs(size)
        self.staging.fetch(turn)
        expected_s, decide_s = self.sizing.seconds(size), self._clock() - began
        follows = bool(self._flights)
        self._flights.append(Launched(size, seated, turn, len(self.waiting), expected_s, decide_s, follows))
        seating.launched += 1
        return True

    def _seat(self, newcomers: list[Sequence], edits: Edits) -> None:
        if newcomers and self.backlog is not None:
            self.backlog.catch_up([sequence for sequence in newcomers if sequence.followed])
        for sequence in newcomers:
            own = wish(sequence, self._policy, self.scheduler.config, self.block, self.confident)
            assert not own.most or sequence.absorbed == sequence.kv_length, "the drafter's context has holes"
            self._wishes[self.seating.sit(sequence, edits, self.results.end(sequence), own.most)] = own

    def _size(self, seated: tuple[Seated, ...]) -> tuple[Size, int]:
        """The round's size, and the draft tokens that it verifies in all."""
        asked = sum(own.most for _, _, own in seated if own.asked)
        willing = sum(own.most for _, _, own in seated if not own.asked)
        tokens = sum(self.late.weight(sequence) for sequence, _, _ in seated)
        return self.sizing.choose(self.seating.needed, tokens, self._policy, asked, willing)

    def _send(self, edits: Edits) -> int:
        """The edits, those of empty seats too; whose turn it is."""
        self.seating.vacate(edits)
        turn = self.seating.launched % 2
        self.staging.send(edits, turn)
        return turn

    def _judge(self, seated: tuple[Seated, ...], edits: Edits, everybody: bool) -> None:
        """What tokens count and confidences are worth, now and then."""
        self._since_refresh += 1
        if not everybody and self._since_refresh < REFRESH:
            return
        self._since_refresh = 0
        for sequence, seat, own in seated:
            if own.most:
                edits.judge(seat, ASKED if own.asked else self.late.weight(sequence), own.threshold)
                edits.correct(seat, self.late.lines(sequence, live=not own.threshold))

    def _run_prompts(self) -> list[TokenDelta] | None:
        """Chunks of prompts; their time is nobody else's."""
        began = self._clock()
        deltas = self.prompts.run(self.running, self.waiting)
        if deltas:
            self._last_read += self._clock() - began
            self._disturbed = 2
        return deltas

    def _read(self) -> list[TokenDelta]:
        """Commit the oldest round under way."""
        launched = self._flights.popleft()
        found, confidence = self.staging.read(launched.turn)
        now = self._clock()
        seconds = max(now - self._last_read, 1e-9) if launched.follows else launched.expected_s
        self._last_read = now
        deltas, gains = self.results.commit(launched, found, confidence, seconds)
        self.seating.finished()
        if len(gains):
            self.sizing.read(gains)
        if launched.follows and not self._disturbed:
            self.sizing.learn(launched.size, seconds)
        self._disturbed = max(self._disturbed - 1, 0)
        return deltas

    def _guess(self, size: Size) -> float:
        """Seconds of a round of this size, were it run by the host."""
        drafting, absorbed = size.seats if size.drafts else 0, size.rows if self.block else 0
        work = Work(requests=size.seats, rows=size.rows, drafting=drafting, absorbed=absorbed)
        return self.scheduler.cost.times(work).total
