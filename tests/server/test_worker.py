"""The boundary: whole rounds, bounded buffers, failures that stay with the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.errors import InvalidRequest, QueueFull
from engine.messages import EndConditions, Request, TokenDelta
from server.boundary import Round
from server.engine_loop import MAX_FAILURES
from server.streams import Arrival, EngineFailed, SlowClient, Stream
from server.worker import Worker
from tests.server.conftest import until
from tests.server.fake_engine import EngineThread, ScriptedEngine, info


def request(name: str = "r", *, max_tokens: int = 7, prompt: tuple[int, ...] = (1, 2)) -> Request:
    return Request(name, prompt, EndConditions(max_tokens))


@asynccontextmanager
async def working(*engines: ScriptedEngine, **options: object) -> AsyncIterator[Worker]:
    """A worker whose engine is the first of `engines`, then the next whenever that is lost."""
    to_come = iter(engines)
    worker = Worker(lambda: EngineThread(next(to_come), info(100)), **options)  # type: ignore[arg-type]
    await worker.start()
    try:
        yield worker
    finally:
        for engine in engines:
            if engine.gate is not None:
                engine.gate.release(10_000)
        await worker.stop()


async def read(stream: Stream) -> list[int]:
    tokens: list[int] = []
    while True:
        for delta, began, ended in await stream.read():
            assert began <= ended
            tokens += delta.tokens
            if delta.finish is not None:
                return tokens


async def test_streams_do_not_mix() -> None:
    engine = ScriptedEngine(range(20, 40))
    async with working(engine) as worker:
        streams = [worker.open(request(str(n), max_tokens=n + 1)) for n in range(6)]
        results = await asyncio.gather(*(read(stream) for stream in streams))
    assert results == [list(range(20, 21 + n)) for n in range(6)]


async def test_the_same_id_may_be_used_again_at_once() -> None:
    engine = ScriptedEngine(range(20, 40), gate=threading.Semaphore(0))
    async with working(engine) as worker:
        first = worker.open(request("same"))
        worker.close(first, finished=False)
        second = worker.open(request("same"))
        assert engine.gate is not None
        engine.gate.release(100)
        assert await read(second) == list(range(20, 27))
    assert len({r.request_id for r in engine.seen}) == 2


async def test_refusals_reach_the_stream() -> None:
    engine = ScriptedEngine([1], max_queue=0)
    async with working(engine) as worker:
        with pytest.raises(QueueFull):
            await read(worker.open(request()))
        with pytest.raises(InvalidRequest):
            await read(worker.open(request(prompt=(13,))))


async def test_closing_cancels_within_a_round() -> None:
    gate = threading.Semaphore(0)
    engine = ScriptedEngine([1, 2, 3], gate=gate)
    async with working(engine) as worker:
        stream = worker.open(request(max_tokens=1000))
        gate.release(2)
        await until(lambda: engine.rounds == 2)
        worker.close(stream, finished=False)
        worker.close(stream, finished=False)
        gate.release(1)  # the round that may be under way
        await until(lambda: not engine.running)
        assert engine.cancelled == [stream.key]
        assert (await worker.stats()).running == 0


async def test_a_client_that_stops_reading_loses_only_its_own_request() -> None:
    engine = ScriptedEngine([1, 2, 3])
    async with working(engine, max_buffered=10) as worker:
        stalled = worker.open(request("stalled", max_tokens=10**6))
        await until(lambda: bool(engine.cancelled))
        reading = worker.open(request("reading", max_tokens=12))
        assert len(await read(reading)) == 12
        with pytest.raises(SlowClient):
            await read(stalled)
    assert engine.cancelled == [stalled.key]


async def test_a_failed_round_fails_its_requests_and_the_engine_goes_on() -> None:
    failures = [RuntimeError("boom")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    engine = ScriptedEngine([1, 2, 3], before_step=fail_once)
    async with working(engine) as worker:
        with pytest.raises(EngineFailed):
            await read(worker.open(request()))
        assert len(await read(worker.open(request()))) == 7
        assert worker.ready
    assert engine.resets == 1


async def test_an_engine_that_keeps_failing_is_replaced() -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    engines = [ScriptedEngine([1], before_step=fail), ScriptedEngine([1])]
    heard: list[bool] = []
    async with working(*engines, on_ready=heard.append) as worker:
        for _ in range(MAX_FAILURES):
            with pytest.raises(EngineFailed):
                await read(worker.open(request()))
        await until(lambda: heard == [True, False, True])
        assert len(await read(worker.open(request()))) == 7
    assert engines[0].resets == MAX_FAILURES


async def test_one_message_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Semaphore(0)
    engine = ScriptedEngine([1, 2, 3], gate=gate)
    messages = []
    original = Worker._receive
    monkeypatch.setattr(Worker, "_receive", lambda self, message: (messages.append(message), original(self, message)))
    async with working(engine) as worker:
        streams = [worker.open(request(str(n), max_tokens=31)) for n in range(8)]
        gate.release(100)
        await asyncio.gather(*(read(stream) for stream in streams))
    rounds = [message for message in messages if isinstance(message, Round) and message.deltas]
    assert len(rounds) == engine.rounds


async def test_every_delta_is_delivered_before_a_failure() -> None:
    stream = Stream("s", 4)
    stream.put(Arrival(TokenDelta("s", tokens=(1,)), 0, 1))
    stream.fail(EngineFailed("gone"))
    assert [arrival.delta.tokens for arrival in await stream.read()] == [(1,)]
    with pytest.raises(EngineFailed):
        await stream.read()
