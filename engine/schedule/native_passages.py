"""Where runs of tokens last ended, natively: an index of one text, and the longest agreement with its end."""

from __future__ import annotations

from engine.schedule.jit import entry, native
from engine.schedule.native_desk import wholes_at


@native
def _slot(tokens, place: int, table, width: int) -> int:  # type: ignore[no-untyped-def]
    """Where the run of `width` tokens before `place` stands in the table, or a free slot for it."""
    mask = table.shape[0] - 1
    mixed = 0
    for k in range(place - width, place):
        mixed = (mixed ^ tokens[k]) * 0x9E3779B97F4A7C1
        mixed ^= mixed >> 29
    slot = mixed & mask
    while table[slot]:
        other = table[slot]
        same = True
        for k in range(1, width + 1):
            same = same and tokens[other - k] == tokens[place - k]
        if same:
            break
        slot = (slot + 1) & mask
    return slot


@entry
def look(
    tokens_address: int, count: int, read: int, table_address: int, size: int, width: int, farthest: int
) -> tuple[int, int]:
    """Enter the runs that end before the last token -> (where an earlier passage like the end goes on, how many tokens
    before it agree with the last ones); (0, 0) for none.

    Args:
        tokens_address: of `count` int64, of which the first `read` were there at the last look.
        table_address: of `size` int64, a power of two above `count`: places where runs ended, 0 where there is none.
        width: tokens of a run; farthest: tokens that are compared at most.
    """
    tokens, table = wholes_at(tokens_address, count), wholes_at(table_address, size)
    for place in range(max(read, width), count):
        table[_slot(tokens, place, table, width)] = place
    if count < width:
        return 0, 0
    start = table[_slot(tokens, count, table, width)]
    if start == 0:
        return 0, 0
    agree, most = width, min(farthest, start)
    while agree < most and tokens[start - 1 - agree] == tokens[count - 1 - agree]:
        agree += 1
    return start, agree
