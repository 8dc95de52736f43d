"""Content hashes of pages: a page's hash covers its tokens and, by chaining, everything before them.

Where a drafter's rows depend on the token after them, a page's hash covers the token after its last one too.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Tokens

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.types import Sequence


def root_hash(salt: str) -> bytes:
    """The hash that precedes the first page; requests share pages only under the same salt."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def page_hash(previous: bytes, tokens: Tokens[int]) -> bytes:
    """Hash of a page that depends on `tokens`, after a page (or root) with hash `previous`. 128 bits."""
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Finds and publishes whole pages of token sequences in a pool.

    A page is published only when every slot of it is committed and written in all caches (target and
    drafter), so that whoever finds it may attend to it in either.

    Args:
        lookahead: tokens past a page on which its rows in the drafter's caches depend, at most 1.
        drafted: whether there is a drafter, whose caches must be written too.
    """

    def __init__(self, pool: PagePool, enabled: bool, lookahead: int = 0, drafted: bool = False) -> None:
        assert 0 <= lookahead <= 1, "the last committed token is all that is known past a complete page"
        self.pool = pool
        self.enabled = enabled
        self.lookahead = lookahead
        self.drafted = drafted
        self.span = PAGE_SIZE + lookahead

    def acquire(self, sequence: Sequence) -> None:
        """Give a sequence without pages the longest published prefix of its tokens.

        At least the last token stays outside: its logits are needed.
        """
        assert not sequence.pages and sequence.kv_length == 0
        if not self.enabled:
            return
        previous = root_hash(sequence.request.cache_salt)
        for start in range(0, len(sequence.tokens) - PAGE_SIZE, PAGE_SIZE):
            content = page_hash(previous, sequence.tokens[start : start + self.span])
            page = self.pool.lookup(content)
            if page is None:
                break
            sequence.pages.append(page)
            sequence.page_hashes.append(content)
            previous = content
        sequence.kv_length = len(sequence.pages) * PAGE_SIZE

    def publish(self, sequence: Sequence) -> None:
        """Publish the pages that the last round completed."""
        if not self.enabled:
            return
        # A look ahead waits for the token that it depends on to be committed, and a page for features that wait.
        written = min(sequence.kv_length, len(sequence.tokens) - self.lookahead)
        complete = (written - (sequence.deferred if self.drafted else 0)) // PAGE_SIZE
        hashes = sequence.page_hashes
        while len(hashes) < complete:
            start = len(hashes) * PAGE_SIZE
            previous = hashes[-1] if hashes else root_hash(sequence.request.cache_salt)
            content = page_hash(previous, sequence.tokens[start : start + self.span])
            self.pool.publish(sequence.pages[len(hashes)], content)
            hashes.append(content)
