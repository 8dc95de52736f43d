"""Keeps one engine process alive: starts it, hears it, and starts it again when it dies or falls silent."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from engine.config import EngineConfig
from engine.errors import LoadError
from engine.messages import EngineInfo
from server.boundary import Ask, Frames, NotLoaded, Ready, pack
from server.logs import log

HANG_S = 120.0
START_S = 1800.0
BEATS = 4  # looks at the engine within the time after which its silence counts as a hang
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between two attempts to start it
END_S = 5.0  # for an engine that was told to end
_PING = Ask(0, "stats")


class Child(Protocol):
    """A started engine. `connection` is our end of its socket pair, and reads as closed once the engine is gone."""

    @property
    def connection(self) -> socket.socket: ...
    def kill(self) -> None: ...
    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""


class _Link(asyncio.Protocol):
    """Our end of the socket pair inside the event loop."""

    def __init__(self, receive: Callable[[Any], None], on_lost: Callable[[], None]) -> None:
        self._receive = receive
        self._on_lost = on_lost
        self._frames = Frames()
        self._transport: asyncio.WriteTransport | None = None
        self.loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()
        self.heard = False  # anything, since this was last set to False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        self.heard = True
        for message in self._frames.feed(data):
            if isinstance(message, Ready):
                self.loaded.set_result(message)
            elif isinstance(message, NotLoaded):
                self.loaded.set_exception(LoadError(message.message))
            else:
                self._receive(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        if not self.loaded.done():
            self.loaded.set_exception(LoadError("the engine ended while loading; the log above has the cause"))
        self._on_lost()

    def send(self, message: Any) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Supervisor:
    """One engine process after the other. All methods belong to the event loop's thread.

    Args:
        spawn: starts an engine.
        receive: takes every message of a loaded engine.
        on_change: told True when an engine is ready, False as soon as it is lost.
        hang_s: an engine that says nothing for this long, though it is asked, counts as hung.
        start_s: as long may loading and compiling take.
    """

    def __init__(
        self,
        spawn: Callable[[], Child],
        receive: Callable[[Any], None],
        on_change: Callable[[bool], None],
        *,
        hang_s: float = HANG_S,
        start_s: float = START_S,
    ) -> None:
        self._spawn = spawn
        self._receive = receive
        self._on_change = on_change
        self._hang_s = hang_s
        self._start_s = start_s
        self._child: Child | None = None
        self._link: _Link | None = None
        self._watching: asyncio.Task[None] | None = None
        self._cold_start_s = 0.0
        self._pause_s = 0.0
        self.ready = False
        self.info: EngineInfo | None = None  # None before the first engine is ready
        self.config: EngineConfig | None = None

    @property
    def retry_after_s(self) -> float:
        """When an engine that is lost now may be expected back."""
        return self._pause_s + self._cold_start_s

    async def start(self) -> None:
        """Starts the engine and waits until it is ready; from then on it is kept alive.

        Raises:
            LoadError: it cannot be had.
        """
        await self._begin()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends the engine after the round that it is in, for good."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._child is not None:
            await self._finish(self._child, END_S)
            self._child = None

    def send(self, message: Any) -> None:
        """Towards the engine; lost when there is none."""
        if self._link is not None:
            self._link.send(message)

    async def _begin(self) -> None:
        began = time.monotonic()
        try:
            child = self._spawn()
        except OSError as error:
            raise LoadError(f"no process for the engine: {error}") from error
        self._child = child
        link = self._link = _Link(self._receive, self._lose)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: link, sock=child.connection)
            async with asyncio.timeout(self._start_s):
                ready = await link.loaded
        except BaseException as error:
            self._child = None
            link.loaded.cancel()
            await self._finish(child, 0)
            if isinstance(error, TimeoutError):
                raise LoadError(f"the engine was not ready after {self._start_s:g} s; allow it more") from error
            raise
        self.info, self.config = ready
        self._cold_start_s = time.monotonic() - began
        self.ready = True
        self._on_change(True)

    def _lose(self) -> None:
        if self.ready:
            self.ready = False
            self._on_change(False)

    async def _watch(self) -> None:
        attempts = 0
        while True:
            began = time.monotonic()
            cause = await self._until_lost()
            self._lose()
            assert self._child is not None
            ended = await self._finish(self._child, 0)
            lived_s = time.monotonic() - began
            log("engine_lost", level=logging.ERROR, cause=cause, ended=ended, lived_s=round(lived_s, 3))
            # One that lives no longer than it takes to start must not keep the machine busy with starting it.
            attempts = attempts + 1 if lived_s < self._cold_start_s else 0
            while not self.ready:
                self._pause_s = min(SHORTEST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S) if attempts else 0.0
                await asyncio.sleep(self._pause_s)
                try:
                    await self._begin()
                except LoadError as error:
                    attempts += 1
                    log("engine_not_restarted", level=logging.ERROR, reason=str(error), attempts=attempts)
            log("engine_restarted", seconds=round(self._cold_start_s, 3))

    async def _until_lost(self) -> str:
        """Returns why the engine must be given up: it is gone, or says nothing."""
        assert self._link is not None
        link, silent = self._link, 0
        while silent < BEATS:
            link.heard = False
            link.send(_PING)  # an idle engine has nothing to say unless asked
            try:
                async with asyncio.timeout(self._hang_s / BEATS):
                    await link.lost.wait()
                return "it ended"
            except TimeoutError:
                # Beats are counted rather than time: when this process itself was stopped, only one has passed.
                silent = 0 if link.heard else silent + 1
        return f"it said nothing for {self._hang_s:g} s"

    async def _finish(self, child: Child, grace_s: float) -> str:
        """Hangs up, gives it `grace_s` seconds to end, kills it then; returns how it ended."""
        if self._link is not None:
            self._link.close()
        try:
            async with asyncio.timeout(grace_s):
                return await _ended(child)
        except TimeoutError:
            child.kill()
            return await _ended(child)


async def _ended(child: Child) -> str:
    while (how := child.ended()) is None:  # noqa: ASYNC110  # a process tells nobody but its own waiter
        await asyncio.sleep(0.01)
    return how
