"""One round's decisions: who drafts, how much is verified, which prompt chunks run.

Decides from past rounds and from confidences alone; never looks at a drafted token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial

from engine.config import PAGE_SIZE, EngineConfig
from engine.lookup import Copy, PromptLookup
from engine.page_groups import PageGroups
from engine.prefix_cache import Found, PrefixCache
from engine.schedule.admission import admit, order
from engine.schedule.calibrate import Calibration
from engine.schedule.cost import CostTable, LiveCost, nominal
from engine.schedule.planner import Planner
from engine.schedule.policies import AutoLengths, LengthPolicy
from engine.schedule.preemption import last_in_line, preempt, send_back
from engine.types import DraftBlock, Phase, PlanRow, Sequence, StepPlan


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
        pages: PageGroups,
        cache: PrefixCache,
        policy: LengthPolicy | None,
        block_size: int,
        max_length: int,
        has_confidence: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.pages = pages
        self.cache = cache
        self.policy = policy
        self.block_size = block_size
        self.max_length = max_length
        self.cost = LiveCost(nominal(block_size, config.max_batch_tokens), config.max_batch_tokens)
        self.calibration: Calibration | None = None
        self._has_confidence = has_confidence
        self._clock = clock
        self.planner = self._fresh()
        self.lookup = PromptLookup()
        self.copies: list[Copy] = []  # of this round
        self._decoding: list[Sequence] = []  # of this round, in order
        self._lengths: dict[int, int] = {}  # of its blocks, by their sequences' ids
        self._all: list[Sequence] = []  # that ran in the round before, where all of them decoded

    def _fresh(self) -> Planner:
        return Planner(self.cost, self.block_size, self._has_confidence, self._clock, self.calibration, self.max_length)

    def use(self, table: CostTable) -> None:
        """Start again from a measured cost table."""
        self.cost.replace(table)
        self.forget()

    def forget(self) -> None:
        """Forget what rounds have taught; nothing may be running."""
        self.cost.replace(self.cost.table)
        self.planner = self._fresh()
        self.lookup = PromptLookup()

    def calibrate(self, calibration: Calibration | None) -> None:
        """Use this calibration of the drafter's confidences from now on; nothing may be running."""
        self.calibration = calibration
        self.planner = self._fresh()

    @property
    def draft_length(self) -> int:
        """Slots that each block of this round needs."""
        return self.planner.length

    def choose_drafting(self, running: list[Sequence], waiting: Collection[Sequence] = ()) -> tuple[Sequence, ...]:
        """Sequences that draft this round; each gets pages for the anchor and as many tokens as may be verified.

        Those that had better copy do not draft; `copies` are theirs. Who waits and may enter counts as load.

        Nobody is preempted for a draft: without pages a sequence sits out and decodes plainly.
        """
        prompt_rows = 0
        if not running or running != self._all:
            prompt_rows = self._look_at(running)
        decoding = self._decoding
        room = self.config.max_batch_tokens - self.config.prefill_chunk
        row_cap = max(room // max(len(decoding), 1) - 1, 0)
        planner = self.planner
        prompt_rows = min(prompt_rows, self.config.prefill_chunk)
        places = planner.who_drafts(decoding, row_cap, prompt_rows, self.policy, self._load(running, waiting))
        if self.copies:
            self.copies, planner.copied_rows = [], 0
        if self.lookup.rest:
            self.lookup.rest, self.lookup.asked = self.lookup.rest - 1, False
        else:
            self.copies = self._copy(decoding, places, row_cap)
        if not places:
            return ()
        copying = {id(copy.sequence) for copy in self.copies} if self.copies else ()
        limits, length = planner.limits, planner.length
        drafting = []
        for place in places:
            sequence = decoding[place]
            wanted = sequence.kv_length + 1 + min(limits[place], length)
            if copying and id(sequence) in copying:
                planner.sits_out(place)
            elif wanted <= len(sequence.pages) * PAGE_SIZE or self.pages.grow(sequence, wanted):
                drafting.append(sequence)
            else:
                planner.sits_out(place)
        return tuple(drafting)

    def _look_at(self, running: list[Sequence]) -> int:
        """Find those that decode, in order; rows of the others' prompts."""
        before, self._all = self._decoding, []
        self._decoding = sorted([s for s in running if s.phase is Phase.DECODE], key=order)
        if self.lookup.rest and (comers := set(self._decoding) - set(before)):
            self.lookup.greet(comers, set(self._decoding) - comers, self.planner.look_price)
        if len(self._decoding) == len(running):
            self._all = running[:]
            return 0
        return sum(len(s.tokens) - s.kv_length for s in running if s.phase is Phase.PREFILL)

    @property
    def may_copy(self) -> bool:
        """Whether sequences may copy at all: the configuration and the policy allow it."""
        return self.config.lookup and isinstance(self.policy, AutoLengths)

    def _copy(self, decoding: list[Sequence], places: list[int], row_cap: int) -> list[Copy]:
        """What sequences that repeat themselves copy; who drafts by now copies only what promises more."""
        self.lookup.asked = False
        if not (decoding and self.may_copy) or self.planner.checking:
            return []

        def limit(sequence: Sequence) -> int:
            left = min(sequence.prompt_length + sequence.request.end.max_tokens, self.max_length) - sequence.kv_length
            wish = sequence.request.speculation.max_draft_tokens
            return min(row_cap, left - 2, row_cap if wish is None else wish)

        found = self.lookup.propose(decoding, len(decoding), limit, self.planner.row_price, self.planner.look_price)
        if not found:
            return []
        drafting = {id(decoding[place]): place for place in places}
        copies = []
        for copy in found:
            sequence = copy.sequence
            place = drafting.get(id(sequence))
            if place is not None and sum(copy.survival) < self.planner.expects(place):
                continue
            if self.pages.grow(sequence, sequence.kv_length + 1 + len(copy.tokens)):
                copies.append(copy)
        self.planner.copied_rows = sum(len(copy.tokens) for copy in copies)
        return copies

    def learn_copies(self, plan: StepPlan, accepted: tuple[int, ...]) -> Mapping[int, tuple[float, ...]]:
        """Take in what became of this round's copies; their survivals by sequence."""
        fates = {id(row.sequence): luck for row, luck in zip(plan.rows, accepted, strict=True) if row.copied}
        for copy in self.copies:
            if id(copy.sequence) in fates:
                self.lookup.learn(copy, fates[id(copy.sequence)])
        return {id(copy.sequence): copy.survival for copy in self.copies}

    def choose_lengths(self, block: DraftBlock) -> None:
        """How much of each of its blocks this round verifies."""
        lengths = self.planner.lengths(block, self.policy)
        self._lengths = dict(zip(map(id, block.sequences), lengths, strict=True))

    def plan(self, block: DraftBlock | None, running: list[Sequence], waiting: list[Sequence]) -> StepPlan:
        """Rows for this round: decoding first, then prompt chunks as far as the round's budget goes.

        Args:
            block: whose lengths are chosen.
        """
        self._begin_again(running, waiting)
        rows = self._decode_rows(block, running, waiting)
        self.admit(running, waiting)
        if len(rows) == len(running):  # all decode, and who yields loses its place before it gets a row
            return StepPlan(tuple(rows))
        rows += self._prefill_rows(bool(rows), running, waiting)
        alive = {id(sequence) for sequence in running}
        return StepPlan(tuple(row for row in rows if id(row.sequence) in alive))

    def _load(self, running: list[Sequence], waiting: Collection[Sequence]) -> int:
        """Requests that run or will in a moment."""
        return max(min(len(running) + len(waiting), self.config.max_running), len(running))

    def admit(self, running: list[Sequence], waiting: list[Sequence]) -> None:
        """Let in who may enter."""
        if waiting:
            follows = partial(self._follows, self._load(running, waiting))
            config = self.config
            admit(waiting, running, self.pages, self.cache, config.max_running, config.prefill_chunk, follows)

    def _decode_rows(self, block: DraftBlock | None, running: list[Sequence], waiting: list[Sequence]) -> list[PlanRow]:
        lengths, drafted = ({}, 0) if block is None else (self._lengths, block.length)
        copied = {id(copy.sequence): len(copy.tokens) for copy in self.copies}
        plain = not (lengths or copied)
        rows = []
        for sequence in self._decoding:
            written = sequence.kv_length
            if sequence.phase is not Phase.DECODE:  # gave way to one before it
                continue
            if written >= len(sequence.pages) * PAGE_SIZE and not self._make_room(sequence, running, waiting):
                continue
            if plain:
                rows.append(PlanRow(sequence, written, 1))
                continue
            own = lengths.get(id(sequence))
            if own is not None:
                rows.append(PlanRow(sequence, written, 1 + own, own, True, drafted))
            else:
                copy = copied.get(id(sequence), 0)
                rows.append(PlanRow(sequence, written, 1 + copy, copy, True, 0, copy))
        return rows

    def _make_room(self, sequence: Sequence, running: list[Sequence], waiting: list[Sequence]) -> bool:
        """A page for the anchor; if need be the last in line give way. False where that came to be this one."""
        while not self.pages.grow(sequence, sequence.kv_length + 1):
            victim = last_in_line(running)
            self._preempt(victim, running, waiting)
            if victim is sequence:
                return False
        return True

    def _follows(self, load: int, sequence: Sequence, found: Found) -> bool:
        """Whether a newcomer's features are to be kept: they cost time, and only drafting needs them.

        Rows of its beginning that others ran without features run again for that: for those to come, too. What was
        found so often, this time included, is expected to be found as often again.
        """
        spared = sum(PAGE_SIZE / (2 + self.pages.whole.uses(content)) for content in found.hashes[found.whole :])
        absorbed = len(sequence.tokens) - found.whole * PAGE_SIZE
        return self.planner.follows(sequence, self.policy, load, absorbed, spared)

    def _begin_again(self, running: list[Sequence], waiting: list[Sequence]) -> None:
        """Somebody whose features were not kept runs once more from its beginning: drafting pays by now."""
        sequence = self.planner.returning
        if sequence is None or waiting or sequence.phase is not Phase.DECODE:
            return
        if self.pages.fits(len(sequence.tokens) + 1, 0, len(running), self.config.prefill_chunk):
            self._all = []
            self.planner.leaves(sequence)
            send_back(sequence, running, waiting, self.pages)

    def _preempt(self, victim: Sequence, running: list[Sequence], waiting: list[Sequence]) -> None:
        self._all = []
        self.planner.leaves(victim)
        preempt(victim, running, waiting, self.pages)

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
            while not self.pages.grow(sequence, sequence.kv_length + count):
                victim = last_in_line(running)
                if victim is sequence:
                    break
                self._preempt(victim, running, waiting)
            else:
                rows.append(PlanRow(sequence, sequence.kv_length, count, 0, count == left))
                budget -= count
        return rows
