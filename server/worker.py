"""The one boundary to the engine: it runs in a thread of its own, and only plain messages cross.

Towards the engine go submissions and cancellations through an inbox, read between rounds. Back come the
deltas of a whole round in one wake-up of the event loop. Each request has a bounded buffer: a client that
stops reading loses its request; it never holds the engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from engine.messages import EngineStats, Request, TokenDelta
from server.logs import log

MAX_BUFFERED_ROUNDS = 512
MAX_FAILURES = 3  # rounds that fail one after the other before the engine counts as broken


class EngineFailed(RuntimeError):
    """The engine raised; the request is gone, the server may still be up."""


class SlowClient(RuntimeError):
    """The client left so many rounds unread that its request was ended."""


class EngineLike(Protocol):
    """What the worker uses of `engine.Engine`."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[TokenDelta]: ...
    def reset(self) -> None: ...
    def stats(self) -> EngineStats: ...


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


@dataclass(frozen=True, slots=True)
class _Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class _Cancel:
    key: str


@dataclass(frozen=True, slots=True)
class _Ask:
    reply: asyncio.Future[EngineStats]


class _Stop:
    """Ends the thread."""


_Message = _Submit | _Cancel | _Ask | _Stop


@dataclass(frozen=True, slots=True)
class _Round:
    """What crosses to the event loop in one wake-up."""

    began: float
    ended: float
    deltas: list[TokenDelta]
    failures: list[tuple[str, Exception]]
    everyone: Exception | None = None  # a failure of the engine itself
    broken: bool = False


class Worker:
    """Owns the engine's thread. All methods belong to the event loop's thread."""

    def __init__(
        self,
        engine: EngineLike,
        *,
        max_buffered: int = MAX_BUFFERED_ROUNDS,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._max_buffered = max_buffered
        self._on_broken = on_broken
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._serial = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.broken = False

    def start(self) -> None:
        """Starts the thread; deltas go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the round that it is in."""
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    def open(self, request: Request) -> Stream:
        """Submits. What the engine objects to (InvalidRequest, QueueFull) is raised by the stream.

        Raises:
            EngineFailed: the engine is broken for good.
        """
        if self.broken:
            raise EngineFailed("the engine has failed repeatedly; restart the server")
        # A name of our own: a client may use its id again while late deltas of the first use are under way.
        self._serial += 1
        key = f"{request.request_id}#{self._serial}"
        stream = self._streams[key] = Stream(key, self._max_buffered)
        self._inbox.put(_Submit(replace(request, request_id=key)))
        return stream

    def close(self, stream: Stream, *, finished: bool) -> None:
        """Forgets the stream, and cancels the request unless the engine has `finished` it."""
        if self._streams.pop(stream.key, None) is not None and not finished:
            self._inbox.put(_Cancel(stream.key))

    async def stats(self) -> EngineStats:
        """The engine's own, read between two rounds."""
        reply: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._inbox.put(_Ask(reply))
        return await reply

    # The event loop's side of a round.

    def _deliver(self, round_: _Round) -> None:
        for delta in round_.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None and not stream.put(Arrival(delta, round_.began, round_.ended)):
                stream.fail(SlowClient(f"{self._max_buffered} rounds were left unread"))
                self.close(stream, finished=False)
        for key, error in round_.failures:
            if key in self._streams:
                self._streams.pop(key).fail(error)
        if round_.everyone is not None:
            for stream in self._streams.values():
                stream.fail(round_.everyone)
            self._streams.clear()
        if round_.broken:
            self.broken = True
            self._on_broken()

    # The engine's side: everything below runs in its thread.

    def _run(self) -> None:
        failed_rounds = 0
        while True:
            failures: list[tuple[str, Exception]] = []
            deltas: list[TokenDelta] = []
            began = time.monotonic()
            everyone: Exception | None = None
            try:
                if not self._read_inbox(failures):
                    return
                began = time.monotonic()
                if self._engine.has_work:
                    deltas = self._engine.step()
                    failed_rounds = 0
            except Exception as error:
                failed_rounds += 1
                log("engine_failed", level=logging.ERROR, exc_info=error, in_a_row=failed_rounds)
                everyone = EngineFailed("the engine failed in this round; the request can be sent again")
                deltas = []
                if not self._clear():
                    failed_rounds = MAX_FAILURES
            broken = failed_rounds >= MAX_FAILURES
            if deltas or failures or everyone:
                self._post(_Round(began, time.monotonic(), deltas, failures, everyone, broken))
            if broken:
                self._refuse_for_good()
                return

    def _read_inbox(self, failures: list[tuple[str, Exception]]) -> bool:
        """Handles what has arrived, waiting only when there is nothing to decode; False to stop."""
        while True:
            idle = not failures and not self._engine.has_work
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Submit):
                key = message.request.request_id
                try:
                    self._engine.submit(message.request)
                except Exception as error:  # the handler tells a client's mistake from ours
                    failures.append((key, error))
            elif isinstance(message, _Cancel):
                self._engine.cancel(message.key)
            else:
                self._answer(message)

    def _answer(self, ask: _Ask) -> None:
        assert self._loop is not None
        stats = self._engine.stats()
        self._call(lambda: None if ask.reply.done() else ask.reply.set_result(stats))

    def _clear(self) -> bool:
        """Takes every request out of an engine that has just failed; False when that fails too."""
        try:
            self._engine.reset()
            return True
        except Exception as error:
            log("engine_not_reset", level=logging.ERROR, exc_info=error)
            return False

    def _refuse_for_good(self) -> None:
        """Answers what still arrives, until told to stop."""
        while not isinstance(message := self._inbox.get(), _Stop):
            if isinstance(message, _Submit):
                gone = EngineFailed("the engine has failed repeatedly; restart the server")
                now = time.monotonic()
                self._post(_Round(now, now, [], [(message.request.request_id, gone)]))
            elif isinstance(message, _Ask):
                self._answer(message)

    def _post(self, round_: _Round) -> None:
        self._call(lambda: self._deliver(round_))

    def _call(self, action: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            log("round_undeliverable", level=logging.DEBUG)
