"""Who enters: by priority, then by arrival; only when the prompt's pages are there."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.prefix_cache import Found, PrefixCache
from engine.types import Phase, Sequence


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


def order(sequence: Sequence) -> tuple[int, int]:
    """Smaller goes first."""
    return (-sequence.request.priority, sequence.arrival)


def grow(pool: PagePool, sequence: Sequence, tokens: int) -> bool:
    """Grant pages until `tokens` tokens fit; False, and nothing changed, when the pool cannot."""
    missing = pages_for(tokens) - len(sequence.pages)
    if missing <= 0:
        return True
    pages = pool.allocate(missing)
    if pages is None:
        return False
    sequence.pages += pages
    return True


def admit(
    waiting: list[Sequence],
    running: list[Sequence],
    pool: PagePool,
    cache: PrefixCache,
    max_running: int,
    follows: Callable[[Sequence, Found], bool],
) -> None:
    """Move sequences from `waiting` to `running` while there is room.

    One page a running sequence is left in the pool, so that a newcomer does not at once preempt those who
    decode. With nobody running the first always enters: submission made sure that it fits alone.

    Args:
        follows: whether a newcomer's features are to be kept, given what the cache holds of it; asked of those who fit.
    """
    waiting.sort(key=order)
    while waiting and len(running) < max_running:
        sequence = waiting[0]
        found = cache.find(sequence)
        wanted = pages_for(len(sequence.tokens) + 1)
        if running and wanted - len(found.hashes) + len(running) > pool.available:
            return
        sequence.followed = follows(sequence, found)
        cache.acquire(sequence, found)
        missing = wanted - len(sequence.pages)
        if running and missing + len(running) > pool.available:
            pool.release(sequence.pages)
            sequence.pages = []
            sequence.page_hashes = []
            sequence.kv_length = sequence.absorbed = 0
            return
        waiting.pop(0)
        sequence.phase = Phase.PREFILL
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.kv_length
        running.append(sequence)
