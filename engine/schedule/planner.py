"""The scheduler's memory: who drafts, how much of each block is verified, and what finished rounds teach.

Everything it knows comes from past rounds; of the present block it reads confidences, in the order that the policies
keep (`lengths.py`). The work is done by compiled functions on flat arrays (`native_*.py`): deciding must cost next to
nothing, and nothing at all in rounds in which nobody could draft.

A request is judged by the survivals of its last blocks, a batch by all of them together. Those that sit out are
probed now and then, for a small share of the machine's time, so that drafting comes back when it pays again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableSequence

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_gate, native_round
from engine.schedule import native_sheet as n
from engine.schedule.calibrate import Calibration
from engine.schedule.choose import Rule, choose, rule_of
from engine.schedule.cost import LiveCost
from engine.schedule.finished import NOTHING_COPIED, FinishedRound, counts, settle
from engine.schedule.policies import AutoLengths, LengthPolicy
from engine.schedule.roster import Roster
from engine.schedule.sheet import Blocks, Sheet
from engine.stopwatch import Laps
from engine.types import DraftBlock, Sequence, StepPlan, Verdict

Array = np.ndarray
_FOREVER = 1 << 40
_FRESH, _EVERY = 16, 4  # of rounds that are like those before, so many teach, and from then on one in so many
_NOTHING = np.zeros(0)


class Planner(Roster):
    """Who drafts, and how much of each block is verified.

    Args:
        clock: seconds, for requests' tokens a second.
        max_length: tokens that the context holds.
    """

    def __init__(
        self,
        cost: LiveCost,
        block_size: int,
        has_confidence: bool,
        clock: Callable[[], float] = time.perf_counter,
        calibration: Calibration | None = None,
        max_length: int = _FOREVER,
    ) -> None:
        super().__init__(cost, block_size, has_confidence, calibration, max_length)
        self.clock = clock
        self.rounds = 0
        self.length = block_size  # slots that each block of this round gets
        self.limits: MutableSequence[int] = []  # draft tokens that each decoding request could use
        self.returning: Sequence | None = None  # is not followed, and had better begin again
        self._sheet = self._blank
        self._row_cap = 0
        self._rest = self._rested = 0  # rounds to come, and past, in which nobody may draft
        self._asked_of = 0  # the load when it was last decided
        self._places: list[int] = []
        self._prefill = 0
        self._changed = False  # others decode than in the round before
        self._blocks: Blocks | None = None
        self._ruled: tuple[LengthPolicy | None, Rule | None] = None, None
        self.copied_rows = 0  # rows that this round verifies of copies
        self._alike = 0  # rounds on end in which the same requests decoded plainly, and nothing else ran
        self._taught, self._usual = self._blank, (0.0, 0.0)  # the last that did; what it was to take, a second's price
        self._counted_at = self._tail_s = 0.0  # when deciding was last counted, and what it took since
        self.checking = False  # this round is without drafts, to show what that takes

    def who_drafts(
        self, decoding: list[Sequence], row_cap: int, prefill: int, policy: LengthPolicy | None, load: int = 0
    ) -> list[int]:
        """Places in `decoding` of those that draft; `length` and `limits` then say how much.

        Args:
            row_cap: draft tokens a request, by what a round may hold.
            prefill: prompt rows that the round will run.
            load: all that run, those too whose prompts do; 0: nobody's does.
        """
        self._blocks = self.returning = None
        self.checking = False
        load = max(load, len(decoding))
        if self.following.dismiss(self.decoding, self.load):
            self.stale = True
        changed = self.stale or policy is not self.policy or row_cap != self._row_cap
        changed = changed or load != self.load or decoding != self.decoding
        if not changed and self._rest:
            self._rest -= 1
            self._rested += 1
            return []
        self._changed = changed
        if changed:
            self._row_cap, self._alike = row_cap, 0
            if policy is not self.policy:
                self._rest = 0
            self.keep_books(decoding, policy, load)
        count = len(decoding)
        if policy is None or not count:
            self._sheet = self._all_sit_out(native_gate.OFF)
            self._rest = _FOREVER
            return []
        # Who has come since is not followed: whether somebody had better begin again can wait.
        if (
            self._bystanders
            and self._rest
            and load == self._asked_of
            and self._rested < native_gate.REVIEW * min(load, 4)
        ):
            self._sheet = self._all_sit_out(native_gate.NO_GAIN)
            self._rest -= 1
            self._rested += 1
            return []
        self._prefill, self._asked_of = prefill, load
        given = [s.kv_length for s in decoding]
        given += [s.kv_length - s.absorbed if s.followed else -1 for s in decoding]
        self._sheet = sheet = self._blank.copy()
        sheet.put(n.CONTEXT, given)
        self.tidy()
        judged = isinstance(policy, AutoLengths)
        drafting, self.length, self._rest, returns, self.checking = native_round.who_drafts(
            self.desk_at, sheet.address, count, judged, changed, self._rested, row_cap, load
        )
        self._rested = 0
        self.returning = decoding[returns] if returns >= 0 else None
        if not drafting:
            return []
        self.limits = sheet.column(n.LIMIT)
        self._places = list(range(count))
        if drafting < count:
            self._places = [place for place, why in enumerate(sheet.column(n.SITTING)) if why <= native_gate.PROBE]
        return self._places

    def _all_sit_out(self, why: int) -> Sheet:
        """The sheet of a round in which nobody was asked."""
        sheet = self._blank.copy()
        sheet.put(n.SITTING, [why] * sheet.count)
        return sheet

    def follows(
        self, sequence: Sequence, policy: LengthPolicy | None, load: int, absorbed: int, spared: float = 0.0
    ) -> bool:
        """Whether a newcomer's features are to be kept, so that it may draft.

        Args:
            load: requests that will decode beside it, itself included.
            absorbed: rows that the drafter would take in, and `spared` those that the target would run for that alone.
        """
        if sequence is self.returning:
            self.following.take_back(sequence)
            return True
        return self.following.wants(sequence, policy, load, absorbed, spared)

    def expects(self, place: int) -> float:
        """Draft tokens that the target would keep of each of its last blocks, by their survivals; 0 before any."""
        if self._sheet.column(n.SITTING)[place] in (native_gate.PROBE, native_gate.ASKED):
            return float("inf")
        sequence = self.decoding[place]
        seen = min(int(self.books.whole[sequence.slot, b.BLOCKS_SEEN]), b.BLOCKS)
        return float(self.books.curves[sequence.slot, :seen].sum()) / seen if seen else 0.0

    def sits_out(self, place: int) -> None:
        """Somebody who was to draft finds no room."""
        self._sheet.words[n.HEAD + n.SITTING * self._sheet.count + place] = native_gate.NO_ROOM
        self._places = [other for other in self._places if other != place]

    def lengths(self, block: DraftBlock | None, policy: LengthPolicy | None) -> list[int]:
        """Verified lengths of the block's sequences."""
        if block is None or policy is None:
            return []
        assert len(block.sequences) == len(self._places), "who drafts was decided otherwise"
        self._blocks = blocks = Blocks.of(block.sequences, block.length)
        if policy is not self._ruled[0]:
            self._ruled = policy, rule_of(policy)
        around = self._ruled[1], self.books, self.memory, self.cost, self._prefill, self.copied_rows
        choose(self.desk_at, block, blocks, self._sheet, policy, *around)
        return blocks.chosen()

    def learn(
        self,
        plan: StepPlan,
        block: DraftBlock | None,
        verdict: Verdict,
        waiting: int,
        absorbed: int,
        watch: Laps,
        copied: Mapping[int, tuple[float, ...]] = NOTHING_COPIED,
        caught_up: int = 0,
    ) -> FinishedRound:
        """Take in a finished round.

        Args:
            waiting: requests in the queue.
            absorbed: rows of this round that the drafter took in, and `caught_up` those that had waited.
            watch: with laps decide, draft, plan, keep, verify, absorb and commit; and `between`, what passed since the
                round before while its messages went out: every round costs that, too.
            copied: by a sequence's id, the survivals of what it copied.
        """
        began = self.clock()
        self.rounds += 1
        accepted = verdict.accepted
        sheet, blocks = self._sheet, self._blocks
        alike = self._is_alike(plan, block, absorbed + caught_up, copied)
        if alike and self._alike > _FRESH and self._alike % _EVERY:
            decide_s = self._decided_s(watch, began)
            seconds = _besides_s(watch) + decide_s, 0.0, watch["absorb"]
            if not self._rested:
                sheet.runs_as(self._taught)
            return self._finished(plan, accepted, waiting, sheet, None, seconds, decide_s, self._usual, copied)
        if self._rested:  # others stand on this sheet already
            self._sheet = sheet = sheet.copy()
        drafted = 0, 0, 0
        if block is not None and blocks is not None:
            settle(plan, accepted, blocks)
            drafted = blocks.address, len(blocks.sequences), blocks.length
        decoding = counts(plan)
        if self._hurried:
            self._hurry(plan, accepted, began)
        certainty = verdict.certainty
        self.following.certain = certainty is not None
        decide_s = self._decided_s(watch, began)
        seconds = _besides_s(watch) + decide_s, watch["draft"], watch["absorb"]
        if block is None and verdict.features is not None and not (absorbed or caught_up or decoding[-1]):
            self.following.kept(watch["keep"] + watch["absorb"])
        self._usual = native_round.observe(
            self.desk_at,
            sheet.address,
            sheet.count,
            # Where somebody has left the round, whose is whose cannot be told.
            certainty if certainty is not None and sheet.count == decoding[0] else _NOTHING,
            *drafted,
            *decoding,
            absorbed,
            caught_up,
            sum(accepted),
            *seconds,
            self._changed,
            self.cost.due(),
        )
        self._taught = sheet
        finished = self._finished(plan, accepted, waiting, sheet, blocks, seconds, decide_s, self._usual, copied)
        self._tail_s = self.clock() - self._counted_at
        return finished

    def _decided_s(self, watch: Laps, began: float) -> float:
        """What deciding took, up to now, with the rest of the round before's, which that could not count itself."""
        self._counted_at = self.clock()
        decide_s = watch["decide"] + self._tail_s + self._counted_at - began
        self._tail_s = 0.0
        return decide_s

    def _is_alike(
        self, plan: StepPlan, block: DraftBlock | None, absorbed: int, copied: Mapping[int, tuple[float, ...]]
    ) -> bool:
        """Whether the same requests decode as the round before, plainly, and nothing else ran; counts such rounds."""
        other = block is not None or absorbed or copied or self.stale or self._hurried or self.checking
        if other or len(plan.rows) != len(self.decoding):
            self._alike = 0
            return False
        self._alike += 1
        return True

    def _finished(
        self,
        plan: StepPlan,
        accepted: tuple[int, ...],
        waiting: int,
        sheet: Sheet,
        blocks: Blocks | None,
        seconds: tuple[float, float, float],
        decide_s: float,
        foretold: tuple[float, float],
        copied: Mapping[int, tuple[float, ...]],
    ) -> FinishedRound:
        policy = "plain" if self.policy is None else self.policy.name
        known = self.rounds, policy, waiting, plan.rows, accepted, self.decoding, sheet, blocks
        return FinishedRound(*known, seconds, decide_s, *foretold, copied)

    def take_in(self, plan: StepPlan, accepted: tuple[int, ...], blocks: Blocks) -> None:
        """What became of the blocks; both are in the order of the plan."""
        settle(plan, accepted, blocks)
        native_round.take_in(self.desk_at, blocks.address, len(blocks.sequences), blocks.length)

    def _hurry(self, plan: StepPlan, accepted: tuple[int, ...], clock: float) -> None:
        """Follow the rates of those that ask for one."""
        for row, luck in zip(plan.rows, accepted, strict=True):
            if row.sequence.slot >= 0 and row.sequence.request.min_tokens_per_s > 0:
                self.books.follow_rate(row.sequence.slot, luck + 1, clock)
        if not self.stale:  # rows in the books belong to whom they did
            self._blank.weigh([self.books.weight(slot) for slot in self._slots])


def _besides_s(watch: Laps) -> float:
    """Of a round, without its decisions, drafts and what the drafter takes in."""
    return watch["plan"] + watch["keep"] + watch["verify"] + watch["commit"] + watch["between"]
