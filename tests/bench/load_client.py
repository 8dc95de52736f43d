"""Closed-loop load on one server: so many users, each with one request at a time, and what they got while it ran."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

from tests.bench.load_arms import Server
from tests.bench.measure import Subject

# Lengths of answers, in turn: every one from 64 to 160, well mixed. Users must not move in step: where all lengths are
# multiples of 32, plain decoding runs several prompts in one round again and again, and nobody else does.
TOKENS = tuple(64 + 37 * number % 97 for number in range(97))
LEAST = 16  # tokens a request must have got in a segment to have a speed
WARM_S = 1.0  # after every user has its first token
PATIENCE_S = 60.0  # for that


@dataclass(frozen=True, slots=True)
class Job:
    """One request of the workload."""

    prompt: str
    tokens: int


@dataclass(slots=True)
class Segment:
    """What happened in some turns of steady load. Counts are of decode rounds, as everywhere."""

    seconds: float = 0.0  # that the server ran
    client_cpu_s: float = 0.0
    tokens: int = 0
    rounds: int = 0
    verified: int = 0
    accepted: int = 0
    finished: int = 0
    finished_rounds: int = 0  # all rounds of the requests that finished here
    skipped_rounds: float = 0.0  # of these, without a draft
    user_rates: list[float] = field(default_factory=list)  # tokens a second of each request, between its tokens

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def user_rate(self) -> float:
        """Median over requests, tokens a second."""
        return statistics.median(self.user_rates) if self.user_rates else 0.0


def mixed_jobs(subject: Subject) -> list[Job]:
    """Every held-out prompt once, domains mixed evenly, with the answer's length."""
    by_domain = subject.by_domain().values()
    places = [((i + 0.5) / len(prompts), p) for prompts in by_domain for i, p in enumerate(prompts)]
    return [Job(p, TOKENS[k % len(TOKENS)]) for k, (_, p) in enumerate(sorted(places))]


class Load:
    """Users of one server, whose requests run on from turn to turn; in between it sleeps, and so does its clock.

    What was sent before it fell asleep, and is read after, counts for it all the same.
    """

    def __init__(self, server: Server, jobs: Sequence[Job], concurrency: int, temperature: float) -> None:
        self.server = server
        self._channel = grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub: Any = wire_grpc.GenerationServiceStub(self._channel)
        self._jobs, self._concurrency, self._temperature = jobs, concurrency, temperature
        self._salt = uuid.uuid4().hex  # every prompt is run, also where another load had it
        self._users: list[asyncio.Future[None]] = []
        self._began = 0  # users that have a first token
        self._segment: Segment | None = None
        self._ran_s = 0.0
        self._woke: float | None = None  # perf_counter

    @contextmanager
    def awake(self, segment: Segment | None = None) -> Iterator[None]:
        """While the server runs; what it brings counts for `segment`."""
        self._segment, cpu_s = segment, time.process_time()
        self._woke = woke = time.perf_counter()
        try:
            with self.server.awake():
                yield
        finally:
            ran_s = time.perf_counter() - woke
            self._ran_s, self._woke = self._ran_s + ran_s, None
            if segment is not None:
                segment.seconds += ran_s
                segment.client_cpu_s += time.process_time() - cpu_s

    async def begin(self) -> None:
        """All users come, and stay.

        Raises:
            RuntimeError: one was refused.
            TimeoutError: one waited too long.
        """
        todo = itertools.count()
        with self.awake():
            self._users = [asyncio.ensure_future(self._user(todo)) for _ in range(self._concurrency)]
            async with asyncio.timeout(PATIENCE_S):
                while self._began < self._concurrency:
                    await asyncio.sleep(0.01)
                    _raise_failures(self._users)
            await asyncio.sleep(WARM_S)

    async def turn(self, segment: Segment, seconds: float) -> None:
        """So much more of the load.

        Raises:
            RuntimeError: a user was refused.
        """
        with self.awake(segment):
            await asyncio.sleep(seconds)
        _raise_failures(self._users)

    async def end(self) -> None:
        """All users go; returns when the server is idle."""
        with self.awake():
            for user in self._users:
                user.cancel()
            await asyncio.gather(*self._users, return_exceptions=True)
            await self._until_idle()
            await self._channel.close()

    async def _user(self, todo: Iterator[int]) -> None:
        first = True
        while True:
            number = next(todo)
            job = self._jobs[number % len(self._jobs)]
            request = wire.GenerateRequest(
                text=job.prompt,
                max_tokens=job.tokens,
                ignore_eos=True,
                sampling=wire.Sampling(temperature=self._temperature),
                cache_salt=f"{self._salt}-{number}",
            )
            call = self._stub.Generate(request)
            pace = Pace()
            try:
                async for message in call:
                    count = len(message.delta.token_ids)
                    if count and first:
                        first = False
                        self._began += 1
                    if self._segment is not None:
                        self._count(self._segment, message, count, pace, self.now())
            finally:
                call.cancel()
                pace.close()

    def now(self) -> float:
        """Seconds that the server has run."""
        return self._ran_s + (0.0 if self._woke is None else time.perf_counter() - self._woke)

    @staticmethod
    def _count(segment: Segment, message: wire.GenerateResponse, count: int, pace: Pace, now: float) -> None:
        segment.tokens += count
        if count:
            pace.token(segment, count, now)
        if message.HasField("delta"):
            done = message.delta.round
            segment.rounds += done.rounds
            segment.verified += done.verified
            segment.accepted += done.accepted
        elif message.HasField("finished"):
            spec = message.finished.speculation
            segment.finished += 1
            segment.finished_rounds += spec.rounds
            segment.skipped_rounds += spec.draft_skip_share * spec.rounds

    async def _until_idle(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                load = (await self._stub.GetModelInfo(wire.GetModelInfoRequest())).load
                if not load.running and not load.waiting:
                    return
                await asyncio.sleep(0.02)


class Pace:
    """One request's speed inside a segment."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._first = self._last = 0.0
        self._tokens = 0

    def token(self, segment: Segment, count: int, now: float) -> None:
        if self._segment is not segment:
            self.close()
            self._segment, self._first, self._tokens = segment, now, 0
        else:
            self._tokens += count
        self._last = now

    def close(self) -> None:
        """The request ended, or the segment did."""
        if self._segment is not None and self._tokens >= LEAST and self._last > self._first:
            self._segment.user_rates.append(self._tokens / (self._last - self._first))


def _raise_failures(users: Sequence[asyncio.Future[None]]) -> None:
    for user in users:
        if user.done() and (error := user.exception()) is not None:
            raise RuntimeError(f"a user of the load was refused: {error}") from error
