"""What sequences hold: pages of the layers that see everything, and of those with a window that have their own."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.types import Sequence
from engine.windows import WindowPages


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class PageGroups:
    """Both groups, page by page of a sequence.

    Args:
        whole: of layers that see everything, the drafter's among them.
        windows: None where no layer has a window, or all share one group.
    """

    whole: PagePool
    windows: WindowPages | None = None

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Grant pages until `tokens` tokens fit; False, and nothing changed, when a pool cannot."""
        missing = pages_for(tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        if self.windows is not None and self.windows.pool.available < missing:
            return False
        pages = self.whole.allocate(missing)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        if self.windows is not None:
            more = self.windows.pool.allocate(missing)
            assert more is not None, "available a moment ago"
            sequence.window_pages += more
        return True

    def fits(self, tokens: int, given: int, running: int, chunk: int) -> bool:
        """Whether a sequence of so many tokens, of whose pages `given` are there, may enter beside those that run.

        A page a running sequence is left, so that a newcomer does not at once preempt those who decode.

        Args:
            chunk: rows of a prompt that a round holds beside those who decode.
        """
        if pages_for(tokens) - given + running > self.whole.available:
            return False
        if self.windows is None:
            return True
        # Who runs holds what a window takes already, or has room for it: the group has a window for each (`loading`).
        own = pages_for(tokens) - self.windows.first(tokens) + pages_for(chunk)
        return own <= self.windows.pool.available

    def leave(self, sequence: Sequence) -> None:
        """Give back the pages that no row to come of this sequence sees."""
        if self.windows is not None:
            self.windows.leave(sequence)

    def give_back(self, sequence: Sequence) -> None:
        """Take all pages from a sequence."""
        self.whole.release(sequence.pages)
        sequence.pages = array("q")
        sequence.page_hashes = []
        if self.windows is not None:
            self.windows.drop(sequence)

    def unpublish(self, sequence: Sequence) -> None:
        """Take its pages out of the prefix index."""
        self.whole.unpublish(sequence.pages)
        if self.windows is not None:
            self.windows.pool.unpublish(self.windows.held(sequence))

    def forget(self) -> None:
        """Empty the prefix index; idle pages become free."""
        self.whole.forget()
        if self.windows is not None:
            self.windows.pool.forget()

    def check(self, running: Iterable[Sequence], held: Iterable[Iterable[int]] = ()) -> None:
        """Prove the accounting of both.

        Args:
            held: pages that nobody's sequence holds any more, and that are not given back yet.

        Raises:
            AssertionError: naming what does not add up.
        """
        running = list(running)
        self.whole.check([*(sequence.pages for sequence in running), *held])
        if self.windows is not None:
            self.windows.pool.check(self.windows.held(sequence) for sequence in running)
            for sequence in running:
                assert len(sequence.window_pages) == len(sequence.pages), "the groups' pages are of different tokens"
