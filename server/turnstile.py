"""One tenant's share: so many generations at once, so many more that wait their turn."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.problems import queue_full

_FIRST_GUESS_S = 1.0
_MEMORY = 0.2  # weight of the newest generation in the usual duration


class Turnstile:
    """Lets generations of one tenant in, higher priority first, then in order of arrival."""

    def __init__(self) -> None:
        self.running = 0
        self._limit: int | None = None  # as the newest arrival knows it: the file of tokens may change
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._serial = itertools.count()
        self._usual_s = _FIRST_GUESS_S

    @property
    def waiting(self) -> int:
        return sum(not turn.done() for _, _, turn in self._waiting)

    @asynccontextmanager
    async def turn(self, priority: int, max_concurrent: int | None, max_queued: int | None) -> AsyncIterator[None]:
        """Waits for a place and holds it.

        Raises:
            CallError: RESOURCE_EXHAUSTED when too many wait already, with the time until a place may be free.
        """
        self._limit = max_concurrent
        self._let_in()  # those first who came before the limit was raised
        if self._full:
            waiting = self.waiting
            if max_queued is not None and waiting >= max_queued:
                wait_s = self._usual_s * (waiting + 1) / max(self.running, 1)
                raise queue_full(
                    f"this token has {self.running} generations running and {waiting} waiting, which is its limit",
                    wait_s,
                )
            await self._wait(priority)
        else:
            self.running += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._usual_s += _MEMORY * (time.monotonic() - began - self._usual_s)
            self._leave()

    async def _wait(self, priority: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._serial), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place came together with the cancellation
                self._leave()
            raise

    def _leave(self) -> None:
        self.running -= 1
        self._let_in()

    @property
    def _full(self) -> bool:
        return self._limit is not None and self.running >= self._limit

    def _let_in(self) -> None:
        while self._waiting and not self._full:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self.running += 1  # the place is held from now on, also by who is still to wake up
                turn.set_result(None)
