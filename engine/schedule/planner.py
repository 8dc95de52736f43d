"""The scheduler's memory: who drafts, how much of each block is verified, and what finished rounds teach.

Everything it knows comes from past rounds; of the present block it reads confidences, in the order that the policies
keep (`lengths.py`). The work is done by compiled functions on flat arrays (`native_*.py`): deciding must cost next to
nothing, and nothing at all in rounds in which nobody could draft.

A request is judged by the survivals of its last blocks, a batch by all of them together. Those that sit out are
probed now and then, for a small share of the machine's time, so that drafting comes back when it pays again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_gate, native_round
from engine.schedule.calibrate import Calibration
from engine.schedule.choose import choose
from engine.schedule.cost import LiveCost
from engine.schedule.finished import Blocks, FinishedRound, counts, fates
from engine.schedule.policies import AutoLengths, LengthPolicy
from engine.schedule.roster import Roster
from engine.stopwatch import Laps
from engine.types import DraftBlock, Sequence, StepPlan, Verdict

Array = np.ndarray
_FOREVER = 1 << 40
_FRESH, _EVERY = 16, 4  # of rounds that are like those before, so many teach, and from then on one in so many
SURE = 0.8  # how near a round without drafts must come to what it was to take
_NOTHING = np.zeros(0)
NOTHING_COPIED: Mapping[int, tuple[float, ...]] = {}


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
        self.limits: list[int] = []  # draft tokens that each decoding request could use
        self.returning: Sequence | None = None  # is not followed, and had better begin again
        self._sittings = np.zeros(0, np.int64)
        self._contexts = self._limits = np.zeros(0, np.int64)
        self._row_cap = 0
        self._rest = self._rested = 0  # rounds to come, and past, in which nobody may draft
        self._asked_of = 0  # the load when it was last decided
        self._places: list[int] = []
        self._prefill = 0
        self._changed = False  # others decode than in the round before
        self._blocks: Blocks | None = None
        self.copied_rows = 0  # rows that this round verifies of copies
        self._alike = 0  # rounds on end in which the same requests decoded plainly, and nothing else ran
        self._usual: tuple[Array, float] = _NOTHING, 0.0  # of the last that taught: its work, what it was to take

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
            self._sittings = np.full(count, native_gate.OFF)
            self._rest = _FOREVER
            return []
        # Who has come since is not followed: whether somebody had better begin again can wait.
        if (
            self._bystanders
            and self._rest
            and load == self._asked_of
            and self._rested < native_gate.REVIEW * min(load, 4)
        ):
            self._sittings = np.full(count, native_gate.NO_GAIN)
            self._rest -= 1
            self._rested += 1
            return []
        self._prefill, self._asked_of = prefill, load
        given = [s.kv_length for s in decoding]
        given += [s.kv_length - s.absorbed if s.followed else -1 for s in decoding]
        known = np.array(given)
        self._contexts = known[:count]
        self._limits, self._sittings = limits, sittings = np.empty((2, count), np.int64)
        self.tidy()
        drafting, self.length, self._rest, returns = native_round.who_drafts(
            self.desk,
            isinstance(policy, AutoLengths),
            changed,
            self._rested,
            row_cap,
            load,
            self._slots,
            known,
            limits,
            sittings,
        )
        self._rested = 0
        self.returning = decoding[returns] if returns >= 0 else None
        if not drafting:
            return []
        self.limits = limits.tolist()
        self._places = list(range(count))
        if drafting < count:
            self._places = [place for place, why in enumerate(sittings.tolist()) if why <= native_gate.PROBE]
        return self._places

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

    @property
    def checking(self) -> bool:
        """Whether this round is without drafts, to show what that takes."""
        return bool(self.memory[b.CHECKING] > 0)

    def expects(self, place: int) -> float:
        """Draft tokens that the target would keep of each of its last blocks, by their survivals; 0 before any."""
        if self._sittings[place] in (native_gate.PROBE, native_gate.ASKED):
            return float("inf")
        sequence = self.decoding[place]
        seen = min(int(self.books.whole[sequence.slot, b.BLOCKS_SEEN]), b.BLOCKS)
        return float(self.books.curves[sequence.slot, :seen].sum()) / seen if seen else 0.0

    def sits_out(self, place: int) -> None:
        """Somebody who was to draft finds no room."""
        self._sittings[place] = native_gate.NO_ROOM
        self._places = [other for other in self._places if other != place]

    def lengths(self, block: DraftBlock | None, policy: LengthPolicy | None) -> list[int]:
        """Verified lengths of the block's sequences."""
        if block is None or policy is None:
            return []
        assert len(block.sequences) == len(self._places), "who drafts was decided otherwise"
        slots, contexts, limits = self._slots, self._contexts, self._limits
        if len(self._places) < len(slots):
            places = self._places
            slots, contexts, limits = slots[places], contexts[places], limits[places]
        curves, lengths = np.empty((3, len(slots), block.tokens.shape[1])), np.empty(len(slots), np.int64)
        self._blocks = blocks = Blocks(block.sequences, slots, contexts, limits, curves, lengths)
        choose(
            self.desk,
            block,
            blocks,
            policy,
            self.books,
            self.memory,
            self.cost,
            self._contexts,
            self._prefill,
            self.copied_rows,
            self._tokens,
        )
        return blocks.lengths.tolist()  # type: ignore[no-any-return]

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
            watch: with laps decide, draft, keep, verify, absorb and commit; and `between`, what passed since the round
                before while its messages went out: every round costs that, too.
            copied: by a sequence's id, the survivals of what it copied.
        """
        began = self.clock()
        self.rounds += 1
        accepted = verdict.accepted
        if self._is_alike(plan, block, absorbed + caught_up, copied) and self._alike > _FRESH and self._alike % _EVERY:
            decide_s = watch["decide"] + self.clock() - began
            work, expected_s = self._usual
            seconds = np.array([_besides_s(watch) + decide_s, 0.0, watch["absorb"]])
            return self._finished(
                plan, accepted, waiting, None, self._weights, work, seconds, decide_s, expected_s, copied
            )
        blocks, weights = self._blocks, self._weights
        drafting: tuple[float, ...] = (0, 0.0, absorbed, 1.0, caught_up)
        if block is not None and blocks is not None:
            self.take_in(plan, accepted, blocks)
            drafting = len(blocks.slots), blocks.context, absorbed, blocks.curves.shape[2] / self.block_size, caught_up
        decoding = counts(plan)
        work = np.array([*decoding, *drafting], np.float64)
        if self._hurried:
            self._hurry(plan, accepted, began)
        decide_s = watch["decide"] + self.clock() - began
        seconds = np.array([_besides_s(watch) + decide_s, watch["draft"], watch["absorb"]])
        if not decoding[-1]:
            if block is not None:
                self.following.looked(float(seconds.sum()), 1 + sum(accepted) / decoding[0])
            elif verdict.features is not None and not (absorbed or caught_up):
                self.following.kept(watch["keep"] + watch["absorb"], float(seconds[0]))
        slots = self._slots
        if len(slots) != decoding[0]:  # somebody left the round
            slots = np.array([row.sequence.slot for row in plan.rows if row.sequence.slot >= 0], np.int64)
        certainty = _NOTHING if verdict.certainty is None else verdict.certainty
        self.following.certain = verdict.certainty is not None
        if self._changed:  # what the host does once for newcomers is not the price of their drafts
            self.cost.stood_still()
        check = self.memory[b.CHECKING] == 1
        renew = self.cost.due() or check
        expected_s = native_round.observe(self.desk, slots, certainty, work, seconds, renew, check)
        if check and not SURE < expected_s / seconds.sum() < 1 / SURE:
            self.memory[b.CHECK_AFTER] = 0.0  # what was believed of such rounds was wrong: look once more
        self._usual = work, expected_s
        return self._finished(plan, accepted, waiting, blocks, weights, work, seconds, decide_s, expected_s, copied)

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
        blocks: Blocks | None,
        weights: Array,
        work: Array,
        seconds: Array,
        decide_s: float,
        expected_s: float,
        copied: Mapping[int, tuple[float, ...]],
    ) -> FinishedRound:
        return FinishedRound(
            self.rounds,
            "plain" if self.policy is None else self.policy.name,
            waiting,
            plan.rows,
            accepted,
            self.decoding,
            self._sittings,
            weights,
            blocks,
            work,
            seconds,
            decide_s,
            expected_s,
            float(self.memory[b.PRICE]),
            copied,
        )

    def take_in(self, plan: StepPlan, accepted: tuple[int, ...], blocks: Blocks) -> None:
        """What became of the blocks; both are in the order of the plan."""
        verified, kept = fates(plan, accepted, blocks)
        native_round.take_in(self.desk, blocks.slots, blocks.curves, verified, kept)

    def _hurry(self, plan: StepPlan, accepted: tuple[int, ...], clock: float) -> None:
        """Follow the rates of those that ask for one."""
        for row, luck in zip(plan.rows, accepted, strict=True):
            if row.sequence.slot >= 0 and row.sequence.request.min_tokens_per_s > 0:
                self.books.follow_rate(row.sequence.slot, luck + 1, clock)
        if not self.stale:  # rows in the books belong to whom they did
            self._weigh()


def _besides_s(watch: Laps) -> float:
    """Of a round, without its decisions, drafts and what the drafter takes in."""
    return watch["keep"] + watch["verify"] + watch["commit"] + watch["between"]
