"""Who sits where, and which pages launched rounds may still write.

A newcomer takes the lowest free seat. Who leaves gives its seat back at once, since edits and rounds run in order, but
its pages only when every round launched so far has been read: until then they are a `Leaver`'s.
"""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass

from engine.device_rounds.state import Edits, RoundState
from engine.page_groups import PageGroups
from engine.types import Sequence


@dataclass(frozen=True, slots=True)
class Leaver:
    """Pages whose sequence has ended while a round that includes it was under way."""

    pages: array[int]
    until: int  # the last such round


class Seating:
    """The host's side of `RoundState`.

    Args:
        pages: of the engine; sequences with pages of windows cannot be seated.
    """

    def __init__(self, state: RoundState, pages: PageGroups) -> None:
        self.state, self._pages = state, pages
        self.seats: dict[Sequence, int] = {}
        self.leavers: list[Leaver] = []
        self.launched = self.read = 0  # rounds
        self._granted: dict[int, int] = {}  # pages that the table holds, by seat
        self._free = list(range(state.seats))
        self._vacated: set[int] = set(range(state.seats))  # seats to be marked as free

    @property
    def flying(self) -> int:
        """Rounds that were launched and not read yet."""
        return self.launched - self.read

    @property
    def needed(self) -> int:
        """Seats up to the last one taken."""
        return 1 + max(self.seats.values(), default=-1)

    def sit(self, sequence: Sequence, edits: Edits, end: int, most: int) -> int:
        """Seat a sequence of which nothing is under way."""
        seat = self.seats[sequence] = heapq.heappop(self._free)
        self._vacated.discard(seat)
        self._granted[seat] = 0
        edits.sit(seat, sequence, end, most)
        return seat

    def grow(self, sequence: Sequence, edits: Edits, tokens: int) -> bool:
        """Pages for so many tokens, granted and in the table; False where a pool cannot."""
        if not self._pages.grow(sequence, tokens):
            return False
        seat = self.seats[sequence]
        granted = self._granted[seat]
        if granted < len(sequence.pages):
            edits.pages(seat, granted, sequence.pages[granted:])
            self._granted[seat] = len(sequence.pages)
        return True

    def vacate(self, edits: Edits) -> None:
        """Mark the seats whose sequences have left."""
        for seat in self._vacated:
            edits.leave(seat)
        self._vacated.clear()

    def give_back(self, sequence: Sequence) -> None:
        """Take all pages from a sequence: in place of `PageGroups.give_back`."""
        seat = self.seats.pop(sequence, None)
        if seat is not None:
            self._leave(seat)
            if self.flying:
                self.leavers.append(Leaver(sequence.pages, self.launched))
                sequence.pages = array("q")
        self._pages.give_back(sequence)

    def finished(self) -> None:
        """One more round has been read."""
        self.read += 1
        while self.leavers and self.leavers[0].until <= self.read:
            self._pages.whole.release(self.leavers.pop(0).pages)

    def clear(self) -> None:
        """Nothing is under way, and the ordinary path takes over: everybody stands up, with their pages."""
        assert not self.flying and not self.leavers
        for seat in self.seats.values():
            self._leave(seat)
        self.seats.clear()

    def _leave(self, seat: int) -> None:
        heapq.heappush(self._free, seat)
        self._vacated.add(seat)
