"""Who enters: by priority, then by arrival; only when the prompt's pages are there."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.prefix_cache import Found, PrefixCache
from engine.types import Phase, Sequence
from engine.windows import WindowPages

_CHUNK = 4  # pages of a prompt's chunk beyond its window


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


def order(sequence: Sequence) -> tuple[int, int]:
    """Smaller goes first."""
    return (-sequence.request.priority, sequence.arrival)


def grow(pool: PagePool, sequence: Sequence, tokens: int, windows: WindowPages | None = None) -> bool:
    """Grant pages until `tokens` tokens fit; False, and nothing changed, when a pool cannot."""
    missing = pages_for(tokens) - len(sequence.pages)
    if missing <= 0:
        return True
    if windows is not None and windows.pool.available < missing:
        return False
    pages = pool.allocate(missing)
    if pages is None:
        return False
    sequence.pages += pages
    if windows is not None:
        more = windows.pool.allocate(missing)
        assert more is not None, "available a moment ago"
        sequence.window_pages += more
    return True


def give_back(pool: PagePool, sequence: Sequence, windows: WindowPages | None = None) -> None:
    """Take all pages from a sequence."""
    pool.release(sequence.pages)
    sequence.pages = []
    sequence.page_hashes = []
    if windows is not None:
        windows.drop(sequence)


def fits(pool: PagePool, windows: WindowPages | None, tokens: int, given: int, running: int) -> bool:
    """Whether a sequence of so many tokens, of whose pages `given` are there, may enter beside those that run.

    A page a running sequence is left, so that a newcomer does not at once preempt those who decode.
    """
    if pages_for(tokens) - given + running > pool.available:
        return False
    if windows is None:
        return True
    # Who runs holds what a window takes already, or has room for it: the group has a window for each (`loading`).
    return pages_for(tokens) - windows.first(tokens) + _CHUNK <= windows.pool.available


def admit(
    waiting: list[Sequence],
    running: list[Sequence],
    pool: PagePool,
    cache: PrefixCache,
    max_running: int,
    windows: WindowPages | None,
    follows: Callable[[Sequence, Found], bool],
) -> None:
    """Move sequences from `waiting` to `running` while there is room.

    With nobody running the first always enters: submission made sure that it fits alone.

    Args:
        follows: whether a newcomer's features are to be kept, given what the cache holds of it; asked of those who fit.
    """
    waiting.sort(key=order)
    while waiting and len(running) < max_running:
        sequence = waiting[0]
        found = cache.find(sequence)
        tokens = len(sequence.tokens) + 1
        if running and not fits(pool, windows, tokens, len(found.hashes), len(running)):
            return
        sequence.followed = follows(sequence, found)
        cache.acquire(sequence, found)
        if running and not fits(pool, windows, tokens, len(sequence.pages), len(running)):
            give_back(pool, sequence, windows)
            sequence.kv_length = sequence.absorbed = 0
            return
        waiting.pop(0)
        sequence.phase = Phase.PREFILL
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.kv_length
        running.append(sequence)
