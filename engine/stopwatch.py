"""Seconds by stage of a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Laps(Protocol):
    """Seconds by stage."""

    def __getitem__(self, name: str, /) -> float: ...


class Stopwatch:
    """Adds up laps by name.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.last = clock()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Count the time since the last lap for `name`."""
        now = self._clock()
        self._laps[name] = self._laps.get(name, 0.0) + now - self.last
        self.last = now

    def add(self, name: str, seconds: float) -> None:
        """Count time that passed elsewhere."""
        self._laps[name] = self._laps.get(name, 0.0) + seconds

    def __getitem__(self, name: str) -> float:
        return self._laps.get(name, 0.0)
