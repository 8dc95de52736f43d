"""Who enters: by priority, then by arrival; only when the prompt's pages are there."""

from __future__ import annotations

from collections.abc import Callable

from engine.page_groups import PageGroups
from engine.prefix_cache import Found, PrefixCache
from engine.types import Phase, Sequence


def order(sequence: Sequence) -> tuple[int, int]:
    """Smaller goes first."""
    return (-sequence.request.priority, sequence.arrival)


def admit(
    waiting: list[Sequence],
    running: list[Sequence],
    pages: PageGroups,
    cache: PrefixCache,
    max_running: int,
    chunk: int,
    follows: Callable[[Sequence, Found], bool],
) -> None:
    """Move sequences from `waiting` to `running` while there is room.

    With nobody running the first always enters: submission made sure that it fits alone.

    Args:
        chunk: rows of a prompt that a round holds beside those who decode.
        follows: whether a newcomer's features are to be kept, given what the cache holds of it; asked of those who fit.
    """
    waiting.sort(key=order)
    while waiting and len(running) < max_running:
        sequence = waiting[0]
        found = cache.find(sequence)
        tokens = len(sequence.tokens) + 1
        if running and not pages.fits(tokens, len(found.hashes), len(running), chunk):
            return
        sequence.followed = follows(sequence, found)
        cache.acquire(sequence, found)
        if running and not pages.fits(tokens, len(sequence.pages), len(running), chunk):
            pages.give_back(sequence)
            sequence.kv_length = sequence.absorbed = 0
            return
        waiting.pop(0)
        sequence.phase = Phase.PREFILL
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.kv_length
        running.append(sequence)
