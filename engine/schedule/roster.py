"""Who decodes: their rows in the scheduler's books, what they weigh, and the desk on which native code finds them."""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_desk, native_gate
from engine.schedule import native_desk as d
from engine.schedule.books import Books
from engine.schedule.calibrate import Calibration
from engine.schedule.cost import LiveCost
from engine.schedule.following import Following
from engine.schedule.policies import AutoLengths, LengthPolicy
from engine.schedule.reliability import Reliability
from engine.schedule.sheet import Sheet
from engine.types import Sequence

Array = np.ndarray
_HOPEFUL = 3  # powers of two of the loads at which, to begin with, much may be spent on following whoever comes
_AHEAD = 8  # rows over which the price of one is taken
LOOK_S = 100e-6  # by so much a look (`engine.lookup`) makes a round longer, where nothing of it is in the caches
_NO_TABLES = np.zeros(0, np.int64), np.zeros((0, 2, 1)), np.zeros((0, 2, 1))


class Roster:
    """The requests that decode, as the scheduler knows them; what a row and a second are worth among them.

    Args:
        max_length: tokens that the context holds.
    """

    def __init__(
        self, cost: LiveCost, block_size: int, has_confidence: bool, calibration: Calibration | None, max_length: int
    ) -> None:
        size = max(block_size, 1)
        self.cost = cost
        self.block_size = block_size
        self.books = Books(size, max_length, calibration)
        self.reliability = Reliability(size, has_confidence)
        self.tables = _NO_TABLES if calibration is None else calibration.tables(size)
        self.memory = np.zeros(b.MEMORY)
        self.memory[b.DECAY] = 0.6
        self.memory[b.CHECK_AFTER] = native_gate.FIRST_CHECK
        self.memory[b.WENT_ON : b.TRIALS_S] = self.memory[b.ON_TRIAL : b.UNPAID] = 1.0
        self.memory[b.TRIALS_S : b.TRIALS_S + _HOPEFUL] = 1.0
        self.following = Following(cost, self.books, self.memory, block_size)
        self.policy: LengthPolicy | None = None
        self.decoding: list[Sequence] = []
        self.load = 0  # of the last round
        self.stale = True
        self._slots: list[int] = []
        self._blank = Sheet.of([], [])  # of those who decode, in every round anew
        self._hurried = False  # somebody asks for a rate
        self._bystanders = False  # all may draft where that pays, and nobody is followed
        self._lay_desk()

    def keep_books(self, decoding: list[Sequence], policy: LengthPolicy | None, load: int = 0) -> None:
        """A row in the books for everybody who decodes, none for anybody else; `load` as for `who_drafts`."""
        books, stay = self.books, set(decoding)
        for sequence in self.decoding:
            if sequence.slot >= 0 and sequence not in stay:
                self.following.ends(sequence, self.load, self.decoding)
                books.leave(sequence)
        for sequence in decoding:
            if sequence.slot < 0:
                books.enter(sequence, policy)
                if books.whole is not self._on_desk[d.WHOLE]:  # there are more of them
                    self._lay_desk()
            elif policy is not self.policy:
                books.rule(sequence, policy)
        self.decoding, self.policy, self.load = decoding, policy, max(load, len(decoding))
        self._slots = slots = [s.slot for s in decoding]
        # In lists: numpy's ways to gather are in no cache by now.
        self._blank = Sheet.of(slots, [books.weight(slot) for slot in slots])
        self._hurried = any(s.request.min_tokens_per_s > 0 for s in decoding)
        self._bystanders = isinstance(policy, AutoLengths) and not (self.following.anybody or books.asking)
        if self._bystanders:  # under another policy others may have been followed
            self._bystanders = not any(s.followed for s in decoding)
        self.stale = False

    def _lay_desk(self) -> None:
        """The arrays that native code finds by their addresses, as they are now."""
        books = self.books
        own = books.whole, books.real, books.curves, books.classes, books.class_count, books.gallery, books.tally
        confidences = *self.tables, *self.reliability.arrays
        self._on_desk: tuple[Array, ...] = *own, books.ratios, self.memory, *self.cost.arrays, *confidences
        self.desk = native_desk.desk_of(self._on_desk)
        self.desk_at = self.desk.ctypes.data

    def leaves(self, sequence: Sequence) -> None:
        """A sequence gives up its place, for now."""
        if sequence.slot >= 0:
            self.books.leave(sequence)
            self.stale = True

    def tidy(self) -> None:
        """Lay the desk anew where the cost table is another."""
        if self.cost.base is not self._on_desk[d.BASE]:
            self._lay_desk()

    def row_s(self) -> float:
        """Seconds of one more verified row."""
        count = len(self.decoding)
        return (self.cost.rows_s(count + _AHEAD) - self.cost.rows_s(count)) / _AHEAD

    def row_price(self) -> float:
        """Tokens that the time of one more verified row would bring otherwise."""
        return self.row_s() * self._price()

    def look_price(self) -> float:
        """The same of a look for a copy."""
        return LOOK_S * self._price()

    def _price(self) -> float:
        """Tokens that a second brings."""
        count = len(self.decoding)
        return float(self.memory[b.PRICE] or count / max(self.cost.rows_s(count), 1e-9))
