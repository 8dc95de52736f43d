"""A value read from files, and read again when they change; a wrong change leaves the old value in place."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import LoadError
from server.logs import log

LOOK_S = 1.0  # looking costs a few system calls, and every call to the server asks

Value = TypeVar("Value")
_Signature = tuple[tuple[int, int, int] | None, ...]


class Reloading(Generic[Value]):
    """What `read` made of `paths`. Any thread may ask.

    Args:
        name: what the log calls it.
        read: reads the files; raises LoadError.
        look_s: the files are looked at no more often.

    Raises:
        LoadError: the first reading failed.
    """

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[[], Value], look_s: float = LOOK_S) -> None:
        self._name = name
        self._paths = tuple(paths)
        self._read = read
        self._look_s = look_s
        self._lock = threading.Lock()
        self._signature = self._sign()
        self._looked = time.monotonic()
        self._value = read()

    def get(self) -> Value:
        """The value that is valid now."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= self._look_s:
                self._looked = now
                self._look()
            return self._value

    def _look(self) -> None:
        signature = self._sign()
        if signature == self._signature:
            return
        self._signature = signature  # before reading: a change in between is seen at the next look
        files = [str(path) for path in self._paths]
        try:
            self._value = self._read()
        except LoadError as error:
            log(
                "not_reloaded", level=logging.ERROR, what=self._name, files=files, reason=str(error), kept="the old one"
            )
        else:
            log("reloaded", what=self._name, files=files)

    def _sign(self) -> _Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()  # follows links: Kubernetes changes a mounted secret by swapping one
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
