"""What is told about rounds: on the engine's side collected from its decision records, on the server's handed out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from engine.messages import EngineStats
from engine.schedule.record import RoundRecord, Unread
from server.boundary import Round, Sample, Totals
from server.round_totals import RoundTotals

AT_ONCE = 32  # rounds added up at a time: beside a model's weights, code and numbers are in no cache any more


class Measured(Protocol):
    """What is used of the engine here."""

    def stats(self) -> EngineStats: ...


class Samples:
    """The engine's side: keeps what the server wants to hear until the next message to it."""

    def __init__(self, engine: Measured) -> None:
        self._engine = engine
        self._wanted = Sample()
        self._records: list[RoundRecord] = []
        self._recorded = -math.inf  # when the last record was kept
        self._sums = RoundTotals()
        self._unsummed: list[Unread] = []
        self._summed = -math.inf  # when the last totals left
        self._told: EngineStats | None = None

    def want(self, wanted: Sample) -> None:
        """From now on, this instead of what was wanted before."""
        if wanted.totals_s != self._wanted.totals_s:
            self._told = None
        if wanted.totals_s is None:
            self._unsummed.clear()
        self._wanted = wanted

    @property
    def wanted(self) -> bool:
        """Whether anything is to be kept."""
        return self._wanted != Sample()

    def see(self, finished: Unread) -> None:
        """Keeps of a round what is wanted."""
        if self._wanted.totals_s is not None:
            self._unsummed.append(finished)
            if len(self._unsummed) == AT_ONCE:
                self._sum()
        if self._wanted.records_s is not None:
            now = time.monotonic()
            if now - self._recorded >= self._wanted.records_s:
                self._records.append(finished.record())
                self._recorded = now

    def _sum(self) -> None:
        for finished in self._unsummed:
            self._sums.add(finished.record())
        self._unsummed.clear()

    def records(self) -> tuple[RoundRecord, ...]:
        """Those kept since the last call."""
        if not self._records:
            return ()
        kept = tuple(self._records)
        self._records.clear()
        return kept

    def totals(self, now: float, *, idle: bool) -> Totals | None:
        """The sums since the last time, when it is time for them: at the latest when the engine goes idle."""
        wanted = self._wanted.totals_s
        if wanted is None or (not idle and now - self._summed < wanted):
            return None
        self._sum()
        stats = self._engine.stats()
        if not self._sums.duration.count and stats == self._told:
            return None
        self._summed, self._told = now, stats
        sums, self._sums = self._sums, RoundTotals()
        return Totals(sums, stats)


class SeenRound(NamedTuple):
    """A round's record, and what the server knows of it besides."""

    record: RoundRecord
    began: float  # time.monotonic
    ended: float
    served: frozenset[str]  # keys of the requests that the round did anything for


T = TypeVar("T")
TakeRecord = Callable[[SeenRound], None]
TakeTotals = Callable[[Totals], None]


class SampleFeed:
    """The server's side: hands records and totals to whoever asked, and asks the engine for no more than needed.

    Args:
        send: takes messages to the engine.
    """

    def __init__(self, send: Callable[[Sample], None]) -> None:
        self._send = send
        self._serial = 0
        self._records: dict[int, tuple[TakeRecord, float]] = {}
        self._totals: dict[int, tuple[TakeTotals, float]] = {}
        self._asked = Sample()

    def records(self, take: TakeRecord, every_s: float = 0.0) -> Callable[[], None]:
        """Gives `take` a round's record, one in `every_s` seconds at least as long as there are rounds; 0: all of them.

        Others may want more of them, which `take` then gets too. Returns what ends it.
        """
        return self._subscribe(self._records, take, every_s)

    def totals(self, take: TakeTotals, every_s: float) -> Callable[[], None]:
        """Gives `take` the sums over all rounds since its last call, about every `every_s` seconds."""
        return self._subscribe(self._totals, take, every_s)

    def deliver(self, message: Round | Totals) -> None:
        if isinstance(message, Totals):
            for take, _ in list(self._totals.values()):
                take(message)
            return
        served = frozenset(delta.request_id for delta in message.deltas)
        for record in message.samples:
            decoding = {request.request_id for request in record.requests}
            seen = SeenRound(record, message.began, message.ended, served | decoding)
            for each, _ in list(self._records.values()):
                each(seen)

    def renew(self) -> None:
        """Asks a new engine for what the old one was asked for."""
        if self._asked != Sample():
            self._send(self._asked)

    def _subscribe(self, takers: dict[int, tuple[T, float]], take: T, every_s: float) -> Callable[[], None]:
        self._serial += 1
        number = self._serial
        takers[number] = (take, every_s)
        self._ask()

        def end() -> None:
            if takers.pop(number, None) is not None:
                self._ask()

        return end

    def _ask(self) -> None:
        wanted = Sample(
            min((every_s for _, every_s in self._records.values()), default=None),
            min((every_s for _, every_s in self._totals.values()), default=None),
        )
        if wanted != self._asked:
            self._asked = wanted
            self._send(wanted)
