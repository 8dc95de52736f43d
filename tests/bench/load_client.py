"""Closed-loop load on one server: so many users, each with one request at a time, and what they got in a window."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

from tests.bench.measure import Subject

# Lengths of answers, in turn: every one from 64 to 160, well mixed. Users must not move in step: where all lengths are
# multiples of 32, plain decoding runs several prompts in one round again and again, and nobody else does.
TOKENS = tuple(64 + 37 * number % 97 for number in range(97))
LEAST = 16  # tokens a request must have got inside the window to have a speed
WARM_S = 0.3  # after every user has its first token
PATIENCE_S = 60.0  # for that


@dataclass(frozen=True, slots=True)
class Job:
    """One request of the workload."""

    prompt: str
    tokens: int


@dataclass(slots=True)
class Segment:
    """What happened between two moments of steady load. Counts are of decode rounds, as everywhere."""

    seconds: float = 0.0
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
    """Users of one server.

    Args:
        salt: requests with other salts share no cached prefix, so every segment does the same work.
    """

    def __init__(self, address: str, jobs: Sequence[Job], concurrency: int, temperature: float, salt: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub: Any = wire_grpc.GenerationServiceStub(self._channel)
        self._jobs = jobs
        self._concurrency = concurrency
        self._temperature = temperature
        self._salt = salt
        self._began = 0  # users that have a first token
        self._segment: Segment | None = None

    async def measure(self, seconds: float, offset: int = 0) -> Segment:
        """Load the server from empty to empty; returns what `seconds` of steady load brought.

        Raises:
            RuntimeError: a user was refused, or waited too long.
        """
        todo = itertools.count(offset)
        users = [asyncio.ensure_future(self._user(todo)) for _ in range(self._concurrency)]
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self._began < self._concurrency:
                    await asyncio.sleep(0.01)
                    _raise_failures(users)
            await asyncio.sleep(WARM_S)
            segment = self._segment = Segment()
            start = time.perf_counter()
            await asyncio.sleep(seconds)
            self._segment = None
            segment.seconds = time.perf_counter() - start
            _raise_failures(users)
            return segment
        finally:
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
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
            pace = _Pace()
            try:
                async for message in call:
                    count = len(message.delta.token_ids)
                    if count and first:
                        first = False
                        self._began += 1
                    if self._segment is not None:
                        self._count(self._segment, message, count, pace)
            finally:
                call.cancel()
                pace.close()

    @staticmethod
    def _count(segment: Segment, message: wire.GenerateResponse, count: int, pace: _Pace) -> None:
        segment.tokens += count
        if count:
            pace.token(segment, count)
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


class _Pace:
    """One request's speed inside the window."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._first = self._last = 0.0
        self._tokens = 0

    def token(self, segment: Segment, count: int) -> None:
        now = time.perf_counter()
        if self._segment is None:
            self._segment, self._first = segment, now
        else:
            self._tokens += count
        self._last = now

    def close(self) -> None:
        """The request ended, or the window did."""
        if self._segment is not None and self._tokens >= LEAST and self._last > self._first:
            self._segment.user_rates.append(self._tokens / (self._last - self._first))


def _raise_failures(users: Sequence[asyncio.Future[None]]) -> None:
    for user in users:
        if user.done() and (error := user.exception()) is not None:
            raise RuntimeError(f"a user of the load was refused: {error}") from error
