"""Pages of layers that see a sliding window: their own group, given back as they leave the window.

The layers that see everything have one page a PAGE_SIZE tokens of a sequence (`Sequence.pages`). Layers with a window
need those of its last positions alone: their caches are smaller, with page ids of their own (`Sequence.window_pages`,
page by page beside `pages`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.types import Sequence

GONE = 0  # stands where a page has left: a page that exists, which no row reads


@dataclass(frozen=True, slots=True)
class WindowPages:
    """The group's pages, of all sequences.

    Args:
        window: positions that a row sees, its own included.
    """

    pool: PagePool
    window: int

    def first(self, length: int) -> int:
        """The first page that rows at positions from `length` on see."""
        return max(0, length + 1 - self.window) // PAGE_SIZE

    def leave(self, sequence: Sequence) -> None:
        """Give back the pages that no row to come of this sequence sees."""
        start, first = sequence.window_start, self.first(sequence.kv_length)
        if first > start:
            self.pool.release(sequence.window_pages[start:first])
            sequence.window_pages[start:first] = [GONE] * (first - start)
            sequence.window_start = first

    def held(self, sequence: Sequence) -> list[int]:
        return sequence.window_pages[sequence.window_start :]

    def drop(self, sequence: Sequence) -> None:
        """Give back everything."""
        self.pool.release(self.held(sequence))
        sequence.window_pages, sequence.window_start = [], 0

    def reusable(self, hashes: list[bytes], most: int) -> int:
        """How many of a prefix's first `most` pages can serve a sequence that goes on behind them.

        The pages that its next row sees must be published here, too.
        """
        run, best = 0, 0
        for page in range(most):
            run = run + 1 if self.pool.published(hashes[page]) is not None else 0
            if run >= page + 1 - self.first((page + 1) * PAGE_SIZE):
                best = page + 1
        return best

    def acquire(self, sequence: Sequence, hashes: Iterable[bytes]) -> None:
        """Hold what a sequence sees of the pages that it was given from the prefix cache."""
        hashes = list(hashes)
        start = self.first(len(hashes) * PAGE_SIZE)
        sequence.window_pages, sequence.window_start = [GONE] * start, start
        for content in hashes[start:]:
            page = self.pool.lookup(content)
            assert page is not None, "found a moment ago"
            sequence.window_pages.append(page)

    def publish(self, sequence: Sequence, page: int, content: bytes) -> None:
        """Publish a sequence's page, if it has not left."""
        if page >= sequence.window_start:
            self.pool.publish(sequence.window_pages[page], content)


def most_held(window: int, block_size: int) -> int:
    """The most pages of the group that a decoding sequence holds: its window's, and those of a block to verify."""
    return -(-(window + block_size + 1) // PAGE_SIZE) + 1
