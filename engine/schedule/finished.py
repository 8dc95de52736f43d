"""A finished round as the planner leaves it: references and sheets, made readable when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from engine.schedule import native_cost as c
from engine.schedule import native_sheet as n
from engine.schedule.record import RequestRecord, RoundRecord, Sitting, Stop
from engine.schedule.sheet import Blocks, Sheet
from engine.types import PlanRow, Sequence, StepPlan

Array = np.ndarray
SITTINGS, STOPS = tuple(Sitting), tuple(Stop)
NOTHING_COPIED: Mapping[int, tuple[float, ...]] = {}


class FinishedRound(NamedTuple):
    """Everything a RoundRecord says, before it is said. Nothing in here changes after the round."""

    number: int
    policy: str
    waiting: int
    rows: tuple[PlanRow, ...]
    accepted: tuple[int, ...]
    decoding: list[Sequence]  # those that the sheet is of
    sheet: Sheet
    blocks: Blocks | None
    seconds: tuple[float, float, float]  # by stage
    decide_s: float
    expected_s: float
    price: float
    copied: Mapping[int, tuple[float, ...]] = NOTHING_COPIED  # id of a sequence: its copy's survivals

    @property
    def work(self) -> Array:
        """What it ran, `native_cost`."""
        return self.sheet.work

    def record(self) -> RoundRecord:
        """The readable form."""
        places = {id(sequence): place for place, sequence in enumerate(self.decoding)}
        drafted = {} if self.blocks is None else {id(s): row for row, s in enumerate(self.blocks.sequences)}
        survival, limits = [], []
        if self.blocks is not None:
            survival, limits = self.blocks.survival.tolist(), self.blocks.limits.tolist()
        requests, expected = [], 0.0
        curve: tuple[float, ...]
        decoding = int(self.work[c.REQUESTS])
        sittings, weights = self.sheet.column(n.SITTING), self.sheet.weights.tolist()
        for row, accepted in zip(self.rows[:decoding], self.accepted, strict=False):
            place, curve = places[id(row.sequence)], ()
            if row.copied:
                curve = self.copied[id(row.sequence)]
                expected += sum(curve)
            elif self.blocks is not None and id(row.sequence) in drafted:
                own = drafted[id(row.sequence)]
                curve = tuple(survival[own][: limits[own]])
                expected += sum(curve[: row.draft_length])
            requests.append(
                RequestRecord(
                    request_id=row.sequence.request.request_id,
                    sitting=Sitting.LOOKUP if row.copied else SITTINGS[sittings[place]],
                    weight=weights[place],
                    context=row.start,
                    drafted=row.drafted or row.copied,
                    verified=row.draft_length,
                    accepted=accepted,
                    survival=curve,
                )
            )
        accepts = sum(r.accepted for r in requests)
        stop = Stop.NO_GAIN if self.copied else Stop.NOBODY  # each copy is as long as it pays
        return RoundRecord(
            round=self.number,
            policy=self.policy,
            running=len(self.rows),
            waiting=self.waiting,
            prefill_rows=int(self.work[c.PREFILL]),
            candidates=sum(len(r.survival) for r in requests),
            verified=sum(r.verified for r in requests),
            predicted_accepts=expected,
            accepted=accepts,
            tokens=len(requests) + accepts,
            predicted_s=self.expected_s,
            measured_s=sum(self.seconds),
            draft_s=self.seconds[c.DRAFT],
            verify_s=self.seconds[c.VERIFY],
            absorb_s=self.seconds[c.ABSORB],
            decide_s=self.decide_s,
            price=self.price,
            stop=stop if self.blocks is None else STOPS[self.blocks.stop],
            requests=tuple(requests),
        )


def counts(plan: StepPlan) -> tuple[int, int, int, int, int]:
    """What the target ran, in `native_cost`'s order: REQUESTS, ROWS, CONTEXT, ROW_CONTEXT, PREFILL."""
    requests = rows = context = row_context = prefill = 0
    for row in plan.rows:
        if row.sequence.slot >= 0:
            requests += 1
            rows += 1
            context += row.start
            if row.draft_length:
                rows += row.draft_length
                row_context += row.draft_length * row.start
        else:
            prefill += row.count
    return requests, rows, context, row_context, prefill


def settle(plan: StepPlan, accepted: tuple[int, ...], blocks: Blocks) -> None:
    """Write what of each block was verified and kept: nothing where its request left the round.

    Plan and blocks have one order.
    """
    kept = [luck for row, luck in zip(plan.rows, accepted, strict=True) if row.drafted]
    if len(kept) == len(blocks.sequences):
        blocks.settle(kept)
        return
    lengths = blocks.lengths
    lengths[:], at = 0, 0
    for row, luck in zip(plan.rows, accepted, strict=True):
        if row.drafted:
            while blocks.sequences[at] is not row.sequence:
                at += 1
            lengths[at], blocks.kept[at] = row.draft_length, luck
            at += 1
