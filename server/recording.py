"""`--record-rounds FILE`: every round's decision record as a line of JSON, in files that stay bounded.

Written by a thread of its own, from a bounded buffer: a slow or full disk costs records, and never a round.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from pathlib import Path

from engine.errors import LoadError
from server.logs import log
from server.rounds import Record, RoundFeed

BUFFERED = 4096  # records that wait for the disk
RETRY_S = 5.0  # after a failed write


class RoundFile:
    """Appends to `path`; when it would exceed `limit_bytes`, it becomes `path`.1, in place of an older one.

    Raises:
        LoadError: it cannot be written at all.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self._limit = limit_bytes
        self._lost = 0  # since the last line written
        self._retry_at = 0.0
        try:
            with path.open("ab"):
                pass
        except OSError as error:
            raise LoadError(
                f"--record-rounds {path}: {error.strerror or error}; give a file that can be written"
            ) from None

    async def follow(self, feed: RoundFeed) -> None:
        """Writes until the feed closes, or this task is cancelled."""
        watcher = feed.open(limit=BUFFERED)
        try:
            while True:
                records, lost = await watcher.read()
                if not records:
                    return
                await asyncio.to_thread(self.write, records, lost)
        finally:
            feed.leave(watcher)

    def write(self, records: list[Record], lost: int = 0) -> None:
        """Appends one line a record; what cannot be written is counted, and a later line `{"lost": n}` says so."""
        self._lost += lost
        if time.monotonic() < self._retry_at:
            self._lost += len(records)
            return
        lines = [{"lost": self._lost}] if self._lost else []
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in [*lines, *records]).encode()
        try:
            self._append(data)
        except OSError as error:
            if not self._retry_at:  # once a trouble, not once a try
                log("rounds_not_recorded", level=logging.WARNING, file=str(self.path), reason=str(error))
            self._retry_at = time.monotonic() + RETRY_S
            self._lost += len(records)
            return
        self._lost, self._retry_at = 0, 0.0

    def _append(self, data: bytes) -> None:
        """All of `data` or nothing."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size and size + len(data) > self._limit:
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            size = 0
        with self.path.open("ab", buffering=0) as file:
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)  # half a line would spoil the file
                raise
