"""Prompt chunks beside rounds on the device: the host runs them between two launches, as the ordinary path would.

They share the stream, so what they write is there before the next round, and who sits already needs not stand up. Only
the chunk that ends a prompt makes the host wait for its token.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.backlog import Backlog
from engine.commit import Committer
from engine.schedule.admission import order
from engine.schedule.finished import FinishedRound
from engine.schedule.late import LateRounds
from engine.schedule.scheduler import Scheduler
from engine.types import Phase, PlanRow, Sequence, StepPlan, TokenDelta
from engine.verify import Verifier


class Prompts:
    """Lets newcomers in and runs their prompts.

    Args:
        add: takes decision records.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        verifier: Verifier,
        committer: Committer,
        backlog: Backlog | None,
        late: LateRounds,
        add: Callable[[FinishedRound], None],
        clock: Callable[[], float],
    ) -> None:
        self._scheduler, self._verifier, self._committer = scheduler, verifier, committer
        self._backlog, self._late, self._add, self._clock = backlog, late, add, clock

    def run(self, running: list[Sequence], waiting: list[Sequence]) -> list[TokenDelta] | None:
        """One round's chunks; None where pages are short: nobody may be preempted while rounds are under way."""
        began = self._clock()
        self._scheduler.admit(running, waiting)
        rows, budget = [], self._scheduler.config.prefill_chunk
        for sequence in sorted((s for s in running if s.phase is Phase.PREFILL), key=order):
            left = len(sequence.tokens) - sequence.kv_length
            count = min(left, budget)
            if not count:
                break
            if not self._committer.pages.grow(sequence, sequence.kv_length + count):
                return None
            rows.append(PlanRow(sequence, sequence.kv_length, count, 0, count == left))
            budget -= count
        if not rows:
            return []
        plan = StepPlan(tuple(rows))
        verdict = self._verifier.run(plan, None)
        if self._backlog is not None:
            self._backlog.take(plan, verdict, ())
        deltas = self._committer.apply(plan, None, verdict)
        self._add(self._late.prompts(plan, len(waiting), self._clock() - began))
        return deltas
