"""One request's way from the engine to its handler: a bounded buffer that wakes its reader."""

from __future__ import annotations

import asyncio
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
        self._items: list[Arrival] = []
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, arrival: Arrival) -> bool:
        """Adds a delta; False when the buffer is full."""
        if len(self._items) >= self._limit:
            return False
        self._items.append(arrival)
        self._wake()
        return True

    def fail(self, error: Exception) -> None:
        """Ends the stream with `error`, after what is buffered."""
        self._failure = self._failure or error
        self._wake()

    async def read(self) -> list[Arrival]:
        """Everything that has arrived since the last look: one round, or several when the reader was behind.

        Raises:
            Exception: whatever the stream failed with, once nothing is left to read.
        """
        while not self._items:
            if self._failure is not None:
                raise self._failure
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        arrived, self._items = self._items, []
        return arrived

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Stalled(RuntimeError):
    """The client took no message for too long."""


class StallGuard:
    """Ends the current task when one write takes longer than `limit_s`. One timer for all writes of a stream.

        with StallGuard(30.0) as guard:
            guard.begin()
            await write()
            guard.end()

    Raises:
        Stalled: on leaving, in place of the cancellation.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._since: float | None = None
        self._expired = False
        self._timer = self._loop.call_later(limit_s, self._look)

    def __enter__(self) -> StallGuard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self._expired and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise Stalled("a write timed out") from error

    def begin(self) -> None:
        """A write begins."""
        self._since = self._loop.time()

    def end(self) -> None:
        """It is done."""
        self._since = None

    def _look(self) -> None:
        waited = 0.0 if self._since is None else self._loop.time() - self._since
        if waited >= self._limit_s:
            self._expired = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._limit_s - waited, self._look)
