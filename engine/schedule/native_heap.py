"""A binary heap of (key, second, third), smallest first, as three arrays and a count."""

from __future__ import annotations

import numpy as np

from engine.schedule.jit import native

Array = np.ndarray


@native
def _before(keys: Array, seconds: Array, thirds: Array, a: int, b: int) -> bool:
    if keys[a] != keys[b]:
        return keys[a] < keys[b]
    if seconds[a] != seconds[b]:
        return seconds[a] < seconds[b]
    return thirds[a] < thirds[b]


@native
def _swap(keys: Array, seconds: Array, thirds: Array, a: int, b: int) -> None:
    keys[a], keys[b] = keys[b], keys[a]
    seconds[a], seconds[b] = seconds[b], seconds[a]
    thirds[a], thirds[b] = thirds[b], thirds[a]


@native
def sink(keys: Array, seconds: Array, thirds: Array, count: int) -> None:
    """Restore the order after the first entry was replaced by a larger one."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= count:
            return
        if child + 1 < count and _before(keys, seconds, thirds, child + 1, child):
            child += 1
        if not _before(keys, seconds, thirds, child, at):
            return
        _swap(keys, seconds, thirds, at, child)
        at = child


@native
def push(keys: Array, seconds: Array, thirds: Array, count: int, key: float, second: int, third: int) -> int:
    """Add an entry; the new count."""
    keys[count], seconds[count], thirds[count] = key, second, third
    at = count
    while at and _before(keys, seconds, thirds, at, (at - 1) // 2):
        _swap(keys, seconds, thirds, at, (at - 1) // 2)
        at = (at - 1) // 2
    return count + 1


@native
def pop(keys: Array, seconds: Array, thirds: Array, count: int) -> int:
    """Take the smallest entry out, to the place behind the remaining ones; the new count."""
    count -= 1
    _swap(keys, seconds, thirds, 0, count)
    sink(keys, seconds, thirds, count)
    return count
