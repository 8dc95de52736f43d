"""The page pool: who holds which page of a group of caches, and nothing about what is in them.

A page id addresses the same span of PAGE_SIZE tokens in every cache of the group: those of the target's layers that see
everything and of the drafter's layers, or those of layers with a window (`windows.py`).
A page is in exactly one state:

    free      no holder, no content worth keeping
    held      one or more sequences hold it (reference count)
    idle      no holder, but its content is published in the prefix cache; taken back when free pages run out
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class PagePool:
    """Reference-counted pages with a prefix index: content hash → page.

    Args:
        total: number of pages.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # popped from the end: low ids first
        self._holders = [0] * total
        self._hash_of: dict[int, bytes] = {}  # published pages
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._bare: dict[int, int] = {}  # published, but not written in the drafter's caches: how often it was used

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one holder each, or None (and nothing changed) when there are not enough."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._withdraw(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder of each page; the last pages of a sequence become the first to be taken back."""
        for page in reversed(list(pages)):
            if self._holders[page] < 1:
                raise AssertionError(f"page {page} released without a holder")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def lookup(self, content: bytes) -> int | None:
        """The page published under this hash, with one more holder; None when there is none."""
        page = self._page_of.get(content)
        if page is None:
            return None
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1
        if page in self._bare:
            self._bare[page] += 1
        return page

    def uses(self, content: bytes) -> int:
        """How often the bare page under this hash was looked up; 0 when there is none."""
        page = self._page_of.get(content)
        return 0 if page is None else self._bare.get(page, 0)

    def published(self, content: bytes) -> bool | None:
        """Whether the page under this hash is whole; None when there is none."""
        page = self._page_of.get(content)
        return None if page is None else page not in self._bare

    def publish(self, page: int, content: bytes, whole: bool = True) -> None:
        """Enter a held page into the prefix index. The first of equals stays, but a bare one yields to a whole one.

        Args:
            whole: complete in all caches; otherwise in the target's alone.
        """
        if self._holders[page] < 1:
            raise AssertionError(f"page {page} published without a holder")
        if page in self._hash_of:
            return
        other = self._page_of.get(content)
        if other is not None:
            if not whole or other not in self._bare:
                return
            self._withdraw(other)
            if other in self._idle:
                del self._idle[other]
                self._free.append(other)
        self._page_of[content] = page
        self._hash_of[page] = content
        if not whole:
            self._bare[page] = 0

    def _withdraw(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]
        self._bare.pop(page, None)

    def unpublish(self, pages: Iterable[int]) -> None:
        """Take held pages out of the prefix index; whoever holds them keeps them."""
        for page in pages:
            if self._holders[page] < 1:
                raise AssertionError(f"page {page} unpublished without a holder")
            if page in self._hash_of:
                self._withdraw(page)

    def forget(self) -> None:
        """Empty the prefix index; idle pages become free."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._hash_of.clear()
        self._page_of.clear()
        self._bare.clear()

    def check(self, held: Iterable[Iterable[int]] | None = None) -> None:
        """Prove the accounting; with `held` (each sequence's pages) also that the counts match the holders.

        Raises:
            AssertionError: naming the first page that does not add up.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(self.total):
            count = self._holders[page]
            states = (page in free) + (page in self._idle) + (count > 0)
            assert count >= 0 and states == 1, f"page {page} is in {states} states, {count} holders"
            assert page not in free or page not in self._hash_of, f"free page {page} is published"
            assert page not in self._idle or page in self._hash_of, f"idle page {page} is not published"
        assert {p: h for h, p in self._page_of.items()} == self._hash_of, "the two sides of the index differ"
        assert self._bare.keys() <= self._hash_of.keys(), "a page that is not published is bare"
        if held is not None:
            counts = Counter(page for pages in held for page in pages)
            for page in range(self.total):
                assert counts[page] == self._holders[page], (
                    f"page {page}: {self._holders[page]} holders counted, {counts[page]} found"
                )
