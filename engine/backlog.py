"""Features that the drafter has not absorbed yet: of requests that sit out, until one drafts again.

Absorbing costs a few percent of a plain round. A request for which drafting does not pay need not pay that either: its
rows wait here and are absorbed in one go when it returns, which is cheaper, or never.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from engine.batch import build_batch, indices, page_table
from engine.drafters.drafter import Drafter
from engine.types import Phase, PlanRow, Sequence, StepPlan, Verdict

LIMIT_BYTES = 128 * 2**20
_BATCH = 256  # rows absorbed at a time when the limit is reached

_Piece = tuple[torch.Tensor, int, int]  # a round's features, first row, count


class Backlog:
    """Stands between the engine and the drafter's `absorb`.

    Args:
        limit_bytes: of features that may wait; beyond, the oldest are absorbed after all.
    """

    def __init__(self, drafter: Drafter, device: torch.device, limit_bytes: int = LIMIT_BYTES) -> None:
        self.drafter = drafter
        self.device = device
        self.limit_bytes = limit_bytes
        self._pieces: dict[Sequence, list[_Piece]] = {}
        self._bytes = 0

    def catch_up(self, sequences: Iterable[Sequence]) -> int:
        """Between rounds: absorb everything that waits for these sequences, and for the oldest if too much waits.

        Returns:
            Rows absorbed.
        """
        self._forget_the_gone()
        chosen = {s: None for s in sequences if s.deferred}
        if self._bytes > self.limit_bytes:
            for sequence in self._pieces:
                if sum(s.deferred for s in chosen) >= _BATCH:
                    break
                chosen[sequence] = None
        return self._absorb(chosen)

    def settle(self, sequence: Sequence) -> int:
        """Absorb what waits for this one, whose tokens are committed; others' may not be. Rows absorbed."""
        return self._absorb([sequence])

    def _absorb(self, chosen: Collection[Sequence]) -> int:
        rows: list[PlanRow] = []
        parts: list[torch.Tensor] = []
        for sequence in chosen:
            parts += [features[first : first + count] for features, first, count in self._drop(sequence)]
            rows.append(PlanRow(sequence, sequence.absorbed, sequence.deferred, 0, needs_token=False))
        if not rows:
            return 0
        plan = StepPlan(tuple(rows))
        following = tuple(row.sequence.tokens[row.start + row.count] for row in rows)
        features = torch.cat(parts)
        batch = build_batch(plan, None, self.device)
        nothing = (0,) * len(rows)
        self.drafter.absorb(plan, Verdict(nothing, following, features, batch, ((),) * len(rows), (False,) * len(rows)))
        for sequence in chosen:
            sequence.deferred = 0
        return int(features.shape[0])

    def take(self, plan: StepPlan, verdict: Verdict, drafting: Iterable[Sequence]) -> int:
        """Absorb this round's kept rows of prompts and of sequences that draft, keep the others'; rows absorbed."""
        active = {id(sequence) for sequence in drafting}
        now: list[int] = []
        later: list[int] = []
        for index, row in enumerate(plan.rows):
            absorbs = row.sequence.phase is not Phase.DECODE or id(row.sequence) in active
            (now if absorbs else later).append(index)
        self._keep(plan, verdict, later)
        absorbed = 0
        if now:
            chosen, part = (plan, verdict) if not later else _subset(plan, verdict, now)
            absorbed = sum(r.count - r.draft_length for r in chosen.rows) + sum(part.accepted)
            self.drafter.absorb(chosen, part)
        return absorbed

    def _drop(self, sequence: Sequence) -> list[_Piece]:
        pieces = self._pieces.pop(sequence, [])
        self._bytes -= sum(features[0].nbytes * count for features, _, count in pieces)
        return pieces

    def _forget_the_gone(self) -> None:
        """Sequences without pages are finished or preempted: what waits for them is of no use."""
        for sequence in [s for s in self._pieces if not (s.pages and s.deferred)]:
            self._drop(sequence)
            sequence.deferred = 0

    def _keep(self, plan: StepPlan, verdict: Verdict, rows: list[int]) -> None:
        assert verdict.features is not None
        if not rows:
            return
        offsets = verdict.batch.query_offsets.tolist()
        for index in rows:
            row = plan.rows[index]
            sequence, count = row.sequence, row.count - row.draft_length + verdict.accepted[index]
            if not sequence.deferred:
                self._drop(sequence)
                self._pieces[sequence] = []
            assert sequence.absorbed + sequence.deferred == row.start, "the backlog has holes"
            self._pieces[sequence].append((verdict.features, offsets[index], count))
            sequence.deferred += count
            self._bytes += verdict.features[0].nbytes * count


def _subset(plan: StepPlan, verdict: Verdict, keep: list[int]) -> tuple[StepPlan, Verdict]:
    """The same round as if only these of its plan rows had run."""
    assert verdict.features is not None
    batch, device = verdict.batch, verdict.features.device
    offsets = batch.query_offsets.tolist()
    flat = [row for index in keep for row in range(offsets[index], offsets[index + 1])]
    ends, owners = [0], []
    for number, index in enumerate(keep):
        count = offsets[index + 1] - offsets[index]
        ends.append(ends[-1] + count)
        owners += [number] * count
    chosen = indices(flat, device)
    rows = tuple(plan.rows[index] for index in keep)
    none = indices([], device)
    part = replace(
        batch,
        input_ids=batch.input_ids.index_select(0, chosen),
        positions=batch.positions.index_select(0, chosen),
        query_offsets=indices(ends, device),
        row_sequence=indices(owners, device),
        slots=batch.slots.index_select(0, chosen),
        page_table=page_table([row.sequence for row in rows], device),
        logit_rows=none,
        logit_offsets=indices([0] * (len(rows) + 1), device),
    )

    return StepPlan(rows), Verdict(
        tuple(verdict.accepted[index] for index in keep),
        tuple(verdict.next_token[index] for index in keep),
        verdict.features.index_select(0, chosen),
        part,
        tuple(verdict.logprobs[index] for index in keep),
        tuple(verdict.failed[index] for index in keep),
    )
