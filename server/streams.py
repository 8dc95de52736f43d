"""One request's way from the engine to its handler: a bounded buffer that wakes its reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

from engine.messages import TokenDelta


class EngineFailed(RuntimeError):
    """The engine lost the request, or is not there; the request can be sent again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SlowClient(RuntimeError):
    """The client left so many rounds unread that its request was ended."""


class Arrival(NamedTuple):
    """A delta, and when its round began and ended (`time.monotonic`)."""

    delta: TokenDelta
    began: float
    ended: float


class Stream:
    """One request's deltas, each with the times at which its round began and ended."""

    def __init__(self, key: str, limit: int) -> None:
        self.key = key  # the request's name inside the engine
        self._limit = limit
        self._items: deque[Arrival] = deque()
        self._failure: Exception | None = None
        self._arrival = asyncio.Event()

    def put(self, arrival: Arrival) -> bool:
        """Adds a delta; False when the buffer is full."""
        if len(self._items) >= self._limit:
            return False
        self._items.append(arrival)
        self._arrival.set()
        return True

    def fail(self, error: Exception) -> None:
        """Ends the stream with `error`, after what is buffered."""
        self._failure = self._failure or error
        self._arrival.set()

    async def __aiter__(self) -> AsyncIterator[list[Arrival]]:
        """Everything that has arrived since the last look: one round, or several when the reader was behind."""
        while True:
            if self._items:
                arrived = list(self._items)
                self._items.clear()
                yield arrived
                continue
            if self._failure is not None:
                raise self._failure
            self._arrival.clear()
            await self._arrival.wait()
