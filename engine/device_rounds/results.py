"""What a round on the device found, made into what the ordinary path would have left: tokens, messages, a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import build_batch
from engine.commit import Committer
from engine.device_rounds.round import Size
from engine.device_rounds.sizing import Wish
from engine.device_rounds.state import Fate, Found
from engine.schedule.finished import FinishedRound
from engine.schedule.late import LateRounds
from engine.types import DraftBlock, Phase, PlanRow, Sequence, StepPlan, TokenDelta, Verdict

Array = np.ndarray
Seated = tuple[Sequence, int, Wish]


@dataclass(frozen=True, slots=True)
class Launched:
    """A round under way."""

    size: Size
    seated: tuple[Seated, ...]
    turn: int  # of the buffers
    waiting: int
    expected_s: float
    decide_s: float
    follows: bool  # right behind another: the time between their results is its own


class Results:
    """Commits rounds one after the other, in the order of their launches.

    Args:
        block: γ; 0 without a drafter.
        add: takes decision records.
    """

    def __init__(
        self, committer: Committer, late: LateRounds, block: int, add: Callable[[FinishedRound], None]
    ) -> None:
        self._committer, self._late, self._block, self._add = committer, late, block, add
        self._nothing = build_batch(StepPlan(()), None, torch.device("cpu"))

    def commit(
        self, launched: Launched, found: Array, confidence: Array, seconds: float
    ) -> tuple[list[TokenDelta], Array]:
        """Its messages, and the weighted survivals of drafts that share a budget.

        Whoever has ended since the launch is passed over.
        """
        there = [(s, seat, own) for s, seat, own in launched.seated if s.phase is Phase.DECODE]
        if not there:
            return [], np.zeros(0)
        seats = [seat for _, seat, _ in there]
        own, drafts = found[:, seats], launched.size.drafts
        plan, verdict = self._plan(there, own, drafts)
        block = None
        if drafts:
            tokens = torch.from_numpy(own[len(Found) :].T.copy())
            block = DraftBlock(tuple(sequence for sequence, _, _ in there), tokens, None, None, None)
        limits = np.array([min(mine.most, self.end(s) - s.kv_length - 2) for s, _, mine in there], np.int64)
        deltas = self._committer.apply(plan, block, verdict)
        asked = np.array([mine.asked for _, _, mine in there])
        drew = np.array([row.drafted > 0 for row in plan.rows])
        blocks, gains = None, np.zeros(0)
        if drew.any():
            names = tuple(row.sequence for row in plan.rows if row.drafted)
            starts = np.array([row.start for row in plan.rows], np.int64)[drew]
            blocks = self._late.blocks(names, starts, np.maximum(limits[drew], 0), confidence[:, seats].T[drew])
            gains = self._late.gains(blocks, asked[drew])
        costs = (launched.waiting, seconds, launched.expected_s, launched.decide_s)
        self._add(self._late.learn(plan, verdict.accepted, blocks, asked, *costs))
        return deltas, gains

    def _plan(self, there: list[Seated], own: Array, drafts: bool) -> tuple[StepPlan, Verdict]:
        """The round in the ordinary path's words; what the drafter has absorbed is written down."""
        accepted, rows = own[Found.ACCEPTED].tolist(), []
        for (sequence, _, mine), verified, luck in zip(there, own[Found.VERIFIED].tolist(), accepted, strict=True):
            drafted = self._block if drafts and mine.most else 0
            rows.append(PlanRow(sequence, sequence.kv_length, 1 + verified, verified, True, drafted))
            if self._block and sequence.followed:
                sequence.absorbed = sequence.kv_length + 1 + luck
        fates = own[Found.STATE].tolist()
        assert Fate.IDLE not in fates, "a round passed over a sequence that goes on"
        failed = tuple(fate == Fate.FAILED for fate in fates)
        tokens = tuple(own[Found.NEXT].tolist())
        verdict = Verdict(tuple(accepted), tokens, None, self._nothing, ((),) * len(rows), failed)
        return StepPlan(tuple(rows)), verdict

    def end(self, sequence: Sequence) -> int:
        """Tokens at which max_tokens or the context ends a sequence."""
        return min(sequence.prompt_length + sequence.request.end.max_tokens, self._committer.max_length)
