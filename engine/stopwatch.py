"""Seconds by stage of a round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol


class Laps(Protocol):
    """Seconds by stage."""

    def __getitem__(self, name: str, /) -> float: ...


class Stopwatch(defaultdict[str, float]):
    """Adds up laps by name; 0 of a stage that had none.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(float)
        self._clock = clock
        self.last = clock()

    def lap(self, name: str) -> None:
        """Count the time since the last lap for `name`."""
        now = self._clock()
        self[name] += now - self.last
        self.last = now

    def add(self, name: str, seconds: float) -> None:
        """Count time that passed elsewhere."""
        self[name] += seconds
