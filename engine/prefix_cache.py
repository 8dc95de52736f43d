"""Content hashes of pages: a page's hash covers its tokens and, by chaining, everything before them.

Where a drafter's rows depend on the token after them, a page's hash covers the token after its last one too.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.types import Sequence
from engine.windows import WindowPages


def root_hash(salt: str) -> bytes:
    """The hash that precedes the first page; requests share pages only under the same salt."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def page_hash(previous: bytes, tokens: Tokens[int]) -> bytes:
    """Hash of a page that depends on `tokens`, after a page (or root) with hash `previous`. 128 bits."""
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


class Found(NamedTuple):
    """What the cache holds of a sequence's beginning."""

    hashes: list[bytes]  # of its pages, from the front
    whole: int  # of these, from the front, those that the drafter's caches hold too


class PrefixCache:
    """Finds and publishes whole pages of token sequences in a pool.

    A page is published only when every slot of it is committed and written: in all caches, target's and drafter's,
    or, of a sequence that is not followed, in the target's alone. Such a bare page serves those that are not followed
    either, and yields to a whole one.

    Args:
        lookahead: tokens past a page on which its rows in the drafter's caches depend, at most 1.
        drafted: whether there is a drafter, whose caches must be written too.
        windows: pages of layers with a window; what a sequence goes on behind must be there, too.
    """

    def __init__(
        self,
        pool: PagePool,
        enabled: bool,
        lookahead: int = 0,
        drafted: bool = False,
        windows: WindowPages | None = None,
    ) -> None:
        assert 0 <= lookahead <= 1, "the last committed token is all that is known past a complete page"
        self.pool = pool
        self.windows = windows
        self.enabled = enabled
        self.lookahead = lookahead
        self.drafted = drafted
        self.span = PAGE_SIZE + lookahead

    def find(self, sequence: Sequence) -> Found:
        """The longest published prefix of a sequence's tokens.

        At least the last token stays outside: its logits are needed.
        """
        hashes: list[bytes] = []
        whole = 0
        if self.enabled:
            previous = root_hash(sequence.request.cache_salt)
            for start in range(0, len(sequence.tokens) - PAGE_SIZE, PAGE_SIZE):
                previous = page_hash(previous, sequence.tokens[start : start + self.span])
                kind = self.pool.published(previous)
                if kind is None:
                    break
                whole += kind and whole == len(hashes)
                hashes.append(previous)
        if self.windows is not None:
            whole = self.windows.reusable(hashes, whole)
            del hashes[self.windows.reusable(hashes, len(hashes)) :]
        return Found(hashes, whole)

    def acquire(self, sequence: Sequence, found: Found | None = None) -> None:
        """Give a sequence without pages what was `found` for it, as far as it may use that."""
        assert not sequence.pages and sequence.kv_length == 0
        found = self.find(sequence) if found is None else found
        usable = found.hashes[: found.whole] if sequence.followed and self.drafted else found.hashes
        for content in usable:
            page = self.pool.lookup(content)
            assert page is not None, "found a moment ago"
            sequence.pages.append(page)
            sequence.page_hashes.append(content)
        if self.windows is not None:
            self.windows.acquire(sequence, usable)
        sequence.kv_length = len(sequence.pages) * PAGE_SIZE
        sequence.absorbed = found.whole * PAGE_SIZE

    def publish(self, sequence: Sequence) -> None:
        """Publish the pages that the last round completed."""
        if not self.enabled or sequence.kv_length // PAGE_SIZE <= len(sequence.page_hashes):
            return
        # A look ahead waits for the token that it depends on to be committed, and a page for features that wait.
        written = min(sequence.kv_length, len(sequence.tokens) - self.lookahead)
        complete = (written - (sequence.deferred if self.drafted and sequence.followed else 0)) // PAGE_SIZE
        hashes = sequence.page_hashes
        while len(hashes) < complete:
            start = len(hashes) * PAGE_SIZE
            previous = hashes[-1] if hashes else root_hash(sequence.request.cache_salt)
            content = page_hash(previous, sequence.tokens[start : start + self.span])
            whole = not self.drafted or start + PAGE_SIZE <= sequence.absorbed
            self.pool.publish(sequence.pages[len(hashes)], content, whole)
            if self.windows is not None:
                self.windows.publish(sequence, len(hashes), content)
            hashes.append(content)
