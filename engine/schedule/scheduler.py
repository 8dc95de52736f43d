"""One round's decisions: who drafts, how much is verified, which prompt chunks run.

Decides from past rounds and from confidences alone; never looks at a drafted token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from engine.config import EngineConfig
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from engine.schedule.admission import admit, grow, order
from engine.schedule.cost import CostTable, LiveCost, nominal
from engine.schedule.planner import Planner
from engine.schedule.policies import LengthPolicy
from engine.schedule.preemption import last_in_line, preempt
from engine.schedule.record import Sitting
from engine.types import DraftBlock, Phase, PlanRow, Sequence, SpeculationMode, StepPlan


class Scheduler:
    """Turns the state of all sequences into a StepPlan, and grants the pages that the plan needs.

    Args:
        block_size: γ of the drafter, 0 without one.
        policy: chooses lengths; None verifies nothing (plain decoding).
        has_confidence: whether the drafter's blocks carry confidences.
        clock: seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        cache: PrefixCache,
        policy: LengthPolicy | None,
        block_size: int,
        max_length: int,
        has_confidence: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.pool = pool
        self.cache = cache
        self.policy = policy
        self.block_size = block_size
        self.max_length = max_length
        self.cost = LiveCost(nominal(block_size, config.max_batch_tokens), config.max_batch_tokens)
        self._fresh = partial(Planner, self.cost, block_size, has_confidence, clock)
        self.planner = self._fresh()
        self._row_cap = block_size  # this round's draft tokens a sequence, by max_batch_tokens

    def use(self, table: CostTable) -> None:
        """Start again from a measured cost table."""
        self.cost.replace(table)
        self.forget()

    def forget(self) -> None:
        """Forget what rounds have taught; nothing may be running."""
        self.cost.replace(self.cost.table)
        self.planner = self._fresh()

    def choose_drafting(self, running: list[Sequence]) -> tuple[Sequence, ...]:
        """Sequences that draft this round; each gets pages for the anchor and its whole block.

        Nobody is preempted for a draft: without pages a sequence sits out and decodes plainly.
        """
        self._row_cap = self._rows_each(running)
        decoding = sorted((s for s in running if s.phase is Phase.DECODE), key=order)
        prompt_rows = sum(len(s.tokens) - s.kv_length for s in running if s.phase is Phase.PREFILL)
        limits = [self.draft_limit(sequence) for sequence in decoding]
        sittings = self.planner.who_drafts(decoding, limits, min(prompt_rows, self.config.prefill_chunk), self.policy)
        drafting = []
        for sequence, limit, sitting in zip(decoding, limits, sittings, strict=True):
            if sitting in (Sitting.DRAFTS, Sitting.ASKED, Sitting.PROBE):
                if grow(self.pool, sequence, sequence.kv_length + 1 + limit):
                    drafting.append(sequence)
                else:
                    self.planner.sits_out(sequence, Sitting.NO_ROOM)
        return tuple(drafting)

    def _rows_each(self, running: list[Sequence]) -> int:
        """Draft tokens a sequence so that all decoding ones, and a prompt chunk, fit into a round."""
        decoding = sum(sequence.phase is Phase.DECODE for sequence in running)
        room = self.config.max_batch_tokens - self.config.prefill_chunk
        return max(room // max(decoding, 1) - 1, 0)

    def draft_limit(self, sequence: Sequence) -> int:
        """Draft tokens that this sequence could use: what γ, the request, max_tokens and context leave.

        A round commits one token more than it accepts, hence the −1.
        """
        wish = sequence.request.speculation
        if self.policy is None or sequence.phase is not Phase.DECODE or wish.mode is SpeculationMode.OFF:
            return 0
        limit = min(
            self.block_size,
            self._row_cap,
            sequence.request.end.max_tokens - sequence.output_length - 1,
            self.max_length - len(sequence.tokens) - 1,
        )
        for cap in (wish.max_draft_tokens, wish.draft_tokens if wish.mode is SpeculationMode.FIXED else None):
            if cap is not None:
                limit = min(limit, cap)
        return max(limit, 0)

    def plan(self, block: DraftBlock | None, running: list[Sequence], waiting: list[Sequence]) -> StepPlan:
        """Rows for this round: decoding first, then prompt chunks as far as the round's budget goes."""
        rows = self._decode_rows(block, running, waiting)
        admit(waiting, running, self.pool, self.cache, self.config.max_running)
        rows += self._prefill_rows(bool(rows), running, waiting)
        alive = {id(sequence) for sequence in running}
        return StepPlan(tuple(row for row in rows if id(row.sequence) in alive))

    def _decode_rows(self, block: DraftBlock | None, running: list[Sequence], waiting: list[Sequence]) -> list[PlanRow]:
        lengths = self._lengths(block)
        rows = []
        for sequence in sorted(running, key=order):
            if sequence.phase is not Phase.DECODE:
                continue
            while not grow(self.pool, sequence, sequence.kv_length + 1):
                victim = last_in_line(running)
                preempt(victim, running, waiting, self.pool)
                if victim is sequence:
                    break
            if sequence.phase is not Phase.DECODE:
                continue
            length = lengths.get(id(sequence), 0)
            drafted = self.block_size if id(sequence) in lengths else 0
            rows.append(PlanRow(sequence, sequence.kv_length, 1 + length, length, True, drafted))
        return rows

    def _lengths(self, block: DraftBlock | None) -> dict[int, int]:
        limits = [] if block is None else [self.draft_limit(sequence) for sequence in block.sequences]
        return self.planner.lengths(block, limits, self.policy)

    def _prefill_rows(self, decoding: bool, running: list[Sequence], waiting: list[Sequence]) -> list[PlanRow]:
        """Prompt chunks. While others decode, a round holds only `prefill_chunk` rows of prompt."""
        budget = self.config.prefill_chunk if decoding else self.config.max_batch_tokens
        rows = []
        for sequence in sorted((s for s in running if s.phase is Phase.PREFILL), key=order):
            if sequence.phase is not Phase.PREFILL:  # preempted for one before it
                continue
            left = len(sequence.tokens) - sequence.kv_length
            count = min(left, budget)
            if count <= 0:
                break
            while not grow(self.pool, sequence, sequence.kv_length + count):
                victim = last_in_line(running)
                if victim is sequence:
                    break
                preempt(victim, running, waiting, self.pool)
            else:
                rows.append(PlanRow(sequence, sequence.kv_length, count, 0, count == left))
                budget -= count
        return rows
