"""Decision records on their way to whoever watches: bounded buffers, and nothing at all while nobody does."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]  # RoundRecord.as_dict
MOST_AT_ONCE = 64  # records a read gives, so that one message stays small


class Watcher:
    """One reader's records.

    Args:
        every: only rounds whose number is a multiple of this.
        limit: records held for a reader who is behind; beyond, the oldest are dropped.
    """

    def __init__(self, every: int, limit: int) -> None:
        self.every = every
        self._items: deque[Record] = deque(maxlen=limit)
        self._lost = 0
        self._closed = False
        self._wakes = asyncio.Event()

    def put(self, records: Iterable[Record]) -> None:
        for record in records:
            if record["round"] % self.every == 0:
                self._lost += len(self._items) == self._items.maxlen
                self._items.append(record)
        self._wakes.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._wakes.set()

    async def read(self) -> tuple[list[Record], int]:
        """Records that have come, oldest first, and how many before them were dropped; none: nothing more will come."""
        while not self._items and not self._closed:
            self._wakes.clear()
            await self._wakes.wait()
        records = [self._items.popleft() for _ in range(min(len(self._items), MOST_AT_ONCE))]
        lost, self._lost = self._lost, 0
        return records, lost


class RoundFeed:
    """Hands records to watchers. All methods belong to the event loop's thread.

    Args:
        subscribe: tells the engine which rounds' records to send: multiples of a number, 0 for none.
    """

    def __init__(self, subscribe: Callable[[int], None]) -> None:
        self._subscribe = subscribe
        self._watchers: list[Watcher] = []
        self._every = 0
        self._closed = False

    def open(self, every: int = 1, limit: int = 512) -> Watcher:
        watcher = Watcher(every, limit)
        self._watchers.append(watcher)
        if self._closed:
            watcher.close()
        self._follow()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """This one watches no more; unknown ones are ignored."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            self._follow()

    def close(self) -> None:
        """Lets every watcher read what it has, and no more."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()

    def renew(self) -> None:
        """There is another engine now."""
        if self._every:
            self._subscribe(self._every)

    def publish(self, records: Iterable[Record]) -> None:
        named = self.named(records)
        for watcher in self._watchers:
            watcher.put(named)

    @staticmethod
    def named(records: Iterable[Record]) -> list[Record]:
        """Records with the clients' own request ids; inside the engine a serial number follows them."""
        found = []
        for record in records:
            requests = [{**r, "request_id": r["request_id"].rpartition("#")[0]} for r in record["requests"]]
            found.append({**record, "requests": requests})
        return found

    def _follow(self) -> None:
        every = math.gcd(*(watcher.every for watcher in self._watchers))
        if every != self._every:
            self._every = every
            self._subscribe(every)
