"""The one boundary to the engine: it runs in a process of its own, and only plain messages cross.

Submissions and cancellations go out as they come, and are read between two rounds. Back comes one message a
round with everybody's deltas: one wake-up of the event loop. Each request has a bounded buffer: a client that
stops reading loses its request; it never holds the engine. An engine that is lost takes the running requests
with it, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from engine.config import EngineConfig
from engine.errors import QueueFull
from engine.messages import EngineInfo, EngineStats, PolicySettings, Request
from server.boundary import Answer, Ask, Cancel, Round, Sample, Submit, Totals, Watch
from server.round_samples import SampleFeed
from server.rounds import RoundFeed
from server.streams import Arrival, EngineFailed, SlowClient, Stream
from server.supervisor import Child, Supervisor

MAX_BUFFERED_ROUNDS = 512


class Worker:
    """The engine as the service sees it. All methods belong to the event loop's thread.

    Args:
        spawn: starts an engine's process.
        max_buffered: rounds that a stream holds for its reader.
        on_ready: told True when the engine is there, False as soon as it is lost.
        times: `hang_s` and `start_s` of `Supervisor`.
    """

    def __init__(
        self,
        spawn: Callable[[], Child],
        *,
        max_buffered: int = MAX_BUFFERED_ROUNDS,
        on_ready: Callable[[bool], None] = lambda ready: None,
        **times: float,
    ) -> None:
        self._engine = Supervisor(spawn, self._receive, self._changed, **times)
        self._max_buffered = max_buffered
        self.on_ready = on_ready
        self._streams: dict[str, Stream] = {}
        self._unfinished: set[str] = set()  # keys of streams that the engine is not done with, as far as is known here
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._serial = 0
        self._changes: dict[str, Any] = {}  # to the policy, since the start
        self.rounds = RoundFeed(lambda every: self._engine.send(Watch(every)))
        self.samples = SampleFeed(self._sample)

    @property
    def ready(self) -> bool:
        """Whether there is an engine now."""
        return self._engine.ready

    @property
    def info(self) -> EngineInfo:
        """What is served. Only once started."""
        assert self._engine.info is not None
        return self._engine.info

    @property
    def config(self) -> EngineConfig:
        """What the engine was told, with everything filled in that was left to the machine. Only once started."""
        assert self._engine.config is not None
        return self._engine.config

    @property
    def policy_name(self) -> str:
        """What decides now; the start's policy unless it was changed."""
        return str(self._changes.get("policy", self.info.policy))

    async def start(self) -> None:
        """Starts the engine and waits until it is ready.

        Raises:
            LoadError: it cannot be had.
        """
        await self._engine.start()

    async def stop(self) -> None:
        """Ends the engine after the round that it is in."""
        await self._engine.stop()

    def check_room(self) -> None:
        """Says at once what the engine would say between two rounds; a round may be long.

        Raises:
            QueueFull: as many requests as may run and wait are there.
        """
        queue = self._changes.get("max_queue") or self.config.max_queue
        if len(self._unfinished) >= self.config.max_running + queue:
            raise QueueFull(len(self._unfinished) - self.config.max_running, retry_after_s=1.0)

    def open(self, request: Request) -> Stream:
        """Submits. What the engine objects to (InvalidRequest, QueueFull) is raised by the stream.

        Raises:
            EngineFailed: there is no engine now.
        """
        self._require()
        # A name of our own: a client may use its id again while late deltas of the first use are under way.
        self._serial += 1
        key = f"{request.request_id}#{self._serial}"
        stream = self._streams[key] = Stream(key, self._max_buffered)
        self._unfinished.add(key)
        self._engine.send(Submit(replace(request, request_id=key)))
        return stream

    def close(self, stream: Stream, *, finished: bool) -> None:
        """Forgets the stream, and cancels the request unless the engine has `finished` it."""
        self._unfinished.discard(stream.key)
        if self._streams.pop(stream.key, None) is not None and not finished:
            self._engine.send(Cancel(stream.key))

    def abandon(self, reason: str) -> None:
        """Ends every stream with EngineFailed, and its request."""
        self._fail(EngineFailed(reason))

    async def stats(self) -> EngineStats:
        """The engine's own, read between two rounds.

        Raises:
            EngineFailed: there is no engine now, or it is lost before it answers.
        """
        return await self._ask("stats")  # type: ignore[no-any-return]

    async def policy(self) -> PolicySettings:
        """What decides now.

        Raises:
            EngineFailed: as in `stats`.
        """
        return await self._ask("policy_settings")  # type: ignore[no-any-return]

    async def update_policy(self, changes: Mapping[str, Any]) -> PolicySettings:
        """Changes what decides, and again in every engine that replaces this one.

        Raises:
            InvalidRequest: a value that does not fit; nothing has changed.
            EngineFailed: as in `stats`.
        """
        settings: PolicySettings = await self._ask("update_policy", dict(changes))
        self._changes.update(changes)
        return settings

    async def last_rounds(self, count: int) -> list[dict[str, Any]]:
        """Records of past rounds, oldest first.

        Raises:
            EngineFailed: as in `stats`.
        """
        return RoundFeed.named(await self._ask("last_rounds", count))

    async def _ask(self, method: str, *arguments: Any) -> Any:
        self._require()
        self._serial += 1
        answer = self._questions[self._serial] = asyncio.get_running_loop().create_future()
        self._engine.send(Ask(self._serial, method, arguments))
        return await answer

    def _require(self) -> None:
        if not self.ready:
            raise EngineFailed("the engine is being restarted", self._engine.retry_after_s)

    def _sample(self, wanted: Sample) -> None:
        if self.ready:  # else `samples` repeats it to the next engine
            self._engine.send(wanted)

    def _receive(self, message: Any) -> None:
        if isinstance(message, Round):
            self._deliver(message)
            if message.samples:
                self.samples.deliver(message)
        elif isinstance(message, Totals):
            self.samples.deliver(message)
        elif isinstance(message, Answer):
            answer = self._questions.pop(message.number, None)
            if answer is not None and not answer.done():  # whoever asked may have gone
                if message.error is not None:
                    answer.set_exception(message.error)
                else:
                    answer.set_result(message.value)

    def _deliver(self, round_: Round) -> None:
        for delta in round_.deltas:
            if delta.finish is not None:
                self._unfinished.discard(delta.request_id)
            stream = self._streams.get(delta.request_id)
            if stream is not None and not stream.put(Arrival(delta, round_.began, round_.ended)):
                stream.fail(SlowClient(f"{self._max_buffered} rounds were left unread"))
                self.close(stream, finished=False)
        if round_.records:
            self.rounds.publish(round_.records)
        for key, error in round_.refused:
            self._unfinished.discard(key)
            if key in self._streams:
                self._streams.pop(key).fail(error)
        if round_.failed:
            self._fail(EngineFailed("the engine failed in this round; the request can be sent again"))

    def _changed(self, ready: bool) -> None:
        if not ready:
            lost = EngineFailed("the engine was lost and is being restarted", self._engine.retry_after_s)
            self._fail(lost)
            for answer in self._questions.values():
                if not answer.done():
                    answer.set_exception(lost)
            self._questions.clear()
        else:  # a new engine knows nothing of what the one before was told
            if self._changes:
                self._engine.send(Ask(0, "update_policy", (self._changes,)))
            self.rounds.renew()
            self.samples.renew()
        self.on_ready(ready)

    def _fail(self, error: EngineFailed) -> None:
        """Ends every stream."""
        for key, stream in self._streams.items():
            stream.fail(error)
            self._engine.send(Cancel(key))  # it may be on its way to an engine that goes on
        self._streams.clear()
        self._unfinished.clear()
