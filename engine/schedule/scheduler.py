"""One round's decisions: who drafts, how much is verified, which prompt chunks run.

Decides from past rounds and from confidences alone; never looks at a drafted token.
"""

from __future__ import annotations

from engine.config import EngineConfig
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from engine.schedule.admission import admit, grow, order
from engine.schedule.lengths import Candidate, LengthPolicy
from engine.schedule.preemption import last_in_line, preempt
from engine.types import DraftBlock, Phase, PlanRow, Sequence, SpeculationMode, StepPlan


class Scheduler:
    """Turns the state of all sequences into a StepPlan, and grants the pages that the plan needs.

    Args:
        block_size: γ of the drafter, 0 without one.
        policy: chooses lengths; None verifies nothing (plain decoding).
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        cache: PrefixCache,
        policy: LengthPolicy | None,
        block_size: int,
        max_length: int,
    ) -> None:
        self.config = config
        self.pool = pool
        self.cache = cache
        self.policy = policy
        self.block_size = block_size if policy is not None else 0
        self.max_length = max_length
        self._row_cap = self.block_size  # this round's draft tokens a sequence, by max_batch_tokens

    def choose_drafting(self, running: list[Sequence]) -> tuple[Sequence, ...]:
        """Sequences that draft this round; each gets pages for the anchor and its whole block.

        Nobody is preempted for a draft: without pages a sequence sits out and decodes plainly.
        """
        drafting = []
        self._row_cap = self._rows_each(running)
        for sequence in sorted(running, key=order):
            limit = self.draft_limit(sequence)
            if limit and grow(self.pool, sequence, sequence.kv_length + 1 + limit):
                drafting.append(sequence)
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
        if sequence.phase is not Phase.DECODE or wish.mode is SpeculationMode.OFF:
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
        if block is None or self.policy is None:
            return {}
        confidence = None if block.confidence is None else block.confidence.tolist()
        candidates = [
            Candidate(None if confidence is None else confidence[row], self.draft_limit(s), s.request.speculation)
            for row, s in enumerate(block.sequences)
        ]
        return dict(zip(map(id, block.sequences), self.policy.lengths(candidates), strict=True))

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
