"""What the planner learns of rounds that the device decided: their blocks, read once they are over.

Such a round's lengths came from confidences that the device corrected itself; here the same confidences give
reliability, books and the decision record what `Planner.learn` gives them of other rounds. The cost table is of rounds
that the host runs, and learns nothing.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule import native_gate, native_round
from engine.schedule import native_sheet as n
from engine.schedule.cost import Work
from engine.schedule.finished import STOPS, FinishedRound, counts
from engine.schedule.planner import Planner
from engine.schedule.policies import LengthPolicy
from engine.schedule.record import Stop
from engine.schedule.scheduler import Scheduler
from engine.schedule.sheet import Blocks, Sheet
from engine.types import Sequence, StepPlan

Array = np.ndarray
_EDGE = 1e-4  # as in `reliability`


class LateRounds:
    """Stands between rounds on the device and the planner's memory.

    Args:
        confident: whether the drafter hands out confidences.
    """

    def __init__(self, scheduler: Scheduler, confident: bool) -> None:
        self._scheduler, self._confident = scheduler, confident

    @property
    def _planner(self) -> Planner:
        return self._scheduler.planner

    def attend(self, decoding: list[Sequence], policy: LengthPolicy | None) -> None:
        """A row in the planner's books for everybody who decodes; when the host runs rounds again it decides anew."""
        planner = self._planner
        known = planner.stale and policy is planner.policy and decoding == planner.decoding
        if not known or any(sequence.slot < 0 for sequence in decoding):
            planner.keep_books(decoding, policy)
            planner.following.forget_ended()
            planner.stale = True

    def weight(self, sequence: Sequence) -> float:
        """What one of its tokens counts."""
        return self._planner.books.weight(sequence.slot)

    def lines(self, sequence: Sequence, live: bool) -> Array:
        """Shift and slope [γ, 2] that turn the logit of a confidence into that of a survival's factor.

        Calibration maps that are no straight lines are left to the live correction.

        Args:
            live: corrected by what confidences have lately been worth; otherwise as calibrated.
        """
        planner = self._planner
        lines, real = planner.reliability.lines, planner.books.real[sequence.slot]
        whole = planner.books.whole[sequence.slot]
        found = lines[whole[b.BAND]].copy() if live else np.tile([0.0, 1.0], (lines.shape[1], 1))
        kinds, affine, _ = planner.tables
        if not self._confident:
            kept = float(np.clip(real[b.KEPT] / real[b.CHECKED], _EDGE, 1 - _EDGE))
            found[:, 0] += found[:, 1] * np.log(kept / (1 - kept))
            found[:, 1] = 0.0
        elif whole[b.METHOD] >= 0 and kinds[whole[b.METHOD]] == 1:
            slope, offset = affine[whole[b.METHOD]]
            found[:, 0] += found[:, 1] * offset
            found[:, 1] *= slope
        return found

    def blocks(self, sequences: tuple[Sequence, ...], starts: Array, limits: Array, confidence: Array) -> Blocks:
        """What was drafted, judged as `Planner.lengths` judges it.

        Args:
            starts, limits: [R] int64 cached positions, and draft tokens that could have been verified.
            confidence: [R, γ] float32 as the drafter gave it.
        """
        planner = self._planner
        blocks = Blocks.of(sequences, confidence.shape[1])
        blocks.slots[:] = [sequence.slot for sequence in sequences]
        blocks.contexts[:], blocks.limits[:] = starts, limits
        sheet = Sheet.of(blocks.slots.tolist(), [1.0] * len(sequences))
        given = np.ascontiguousarray(confidence, np.float32)
        native_round.survive(
            planner.desk_at,
            sheet.address,
            sheet.count,
            0,
            blocks.address,
            *given.shape,
            given.ctypes.data if self._confident else 0,
        )
        return blocks

    def gains(self, blocks: Blocks, asked: Array) -> Array:
        """Weighted survivals of everything that could have been verified, but for blocks that were `asked` for."""
        slots = np.arange(blocks.survival.shape[1])
        open_ = (slots < blocks.limits[:, None]) & ~asked[:, None]
        weighted = blocks.survival * self._planner.books.real[blocks.slots, b.WEIGHT][:, None]
        return weighted[open_]

    def learn(
        self,
        plan: StepPlan,
        accepted: tuple[int, ...],
        blocks: Blocks | None,
        asked: Array,
        waiting: int,
        seconds: float,
        expected_s: float,
        decide_s: float,
    ) -> FinishedRound:
        """Take in a finished round. Replayed in one piece, it has one figure of seconds: that of verifying.

        Args:
            asked: [rows] whether a sequence, or the policy, wanted its drafts verified.
        """
        planner = self._planner
        planner.rounds += 1
        clock = planner.clock()
        decoding = [row.sequence for row in plan.rows]
        sittings = np.full(len(decoding), native_gate.NO_GAIN if planner.policy is not None else native_gate.OFF)
        drafting: tuple[float, ...] = (0, 0.0, 0, 1.0)
        if blocks is not None:
            drew = np.array([row.drafted > 0 for row in plan.rows])
            blocks.lengths[:] = [row.draft_length for row in plan.rows if row.drafted]
            everything = (blocks.lengths == blocks.limits).all()
            stop = Stop.RULE if asked[drew].all() else Stop.EVERYTHING if everything else Stop.BUDGET
            blocks.stop = STOPS.index(stop)
            planner.take_in(plan, accepted, blocks)
            drafting = len(blocks.slots), float(blocks.contexts.sum()), sum(accepted) + len(accepted), 1.0
            sittings[drew] = np.where(asked[drew], native_gate.ASKED, native_gate.DRAFTS)
        for row, luck in zip(plan.rows, accepted, strict=True):
            if row.sequence.slot >= 0 and row.sequence.request.min_tokens_per_s > 0:
                planner.books.follow_rate(row.sequence.slot, luck + 1, clock)
        slots = [sequence.slot for sequence in decoding]
        sheet = Sheet.of(slots, [planner.books.weight(slot) for slot in slots])
        sheet.put(n.SITTING, sittings.tolist())
        sheet.work[:] = [*counts(plan), *drafting, 0.0]
        return FinishedRound(
            planner.rounds,
            "plain" if planner.policy is None else planner.policy.name,
            waiting,
            plan.rows,
            accepted,
            decoding,
            sheet,
            blocks,
            (seconds, 0.0, 0.0),
            decide_s,
            expected_s,
            float(planner.memory[b.PRICE]),
        )

    def prompts(self, plan: StepPlan, waiting: int, seconds: float) -> FinishedRound:
        """The record of chunks that ran between two rounds."""
        planner = self._planner
        planner.rounds += 1
        rows = sum(row.count for row in plan.rows)
        sheet = Sheet.of([], [])
        sheet.work[[c.PREFILL, c.DRAFT_SHARE]] = rows, 1.0
        return FinishedRound(
            planner.rounds,
            "plain" if planner.policy is None else planner.policy.name,
            waiting,
            plan.rows,
            (0,) * len(plan.rows),
            [],
            sheet,
            None,
            (seconds, 0.0, 0.0),
            0.0,
            self._scheduler.cost.times(Work(prefill=rows)).total,
            float(planner.memory[b.PRICE]),
        )
