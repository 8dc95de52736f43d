"""Tries, deadlines, cancellation and load balancing: the client against the real service around a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from contextlib import aclosing

import grpc
import pytest

from clients import retry
from clients.client import Client
from clients.errors import (
    AlreadyRunning,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    ServerError,
    Unavailable,
    make_error,
    to_error,
)
from clients.events import Options, Started
from clients.retry import NEVER, Retry
from engine.errors import QueueFull
from engine.messages import Request
from tests.server.conftest import Launch, Running, until

QUICK = Retry(first_s=0.01, longest_s=0.02)
FULL = ResourceExhausted("RESOURCE_EXHAUSTED", "full", retry_after_s=2.0)
AWAY = Unavailable("UNAVAILABLE", "nobody")


def full_for(running: Running, times: int, retry_after_s: float) -> list[float]:
    """Makes the engine refuse its next `times` requests; returns when it was asked, as that grows."""
    asked: list[float] = []
    submit = running.engine.submit

    def refuse(request: Request) -> None:
        asked.append(time.monotonic())
        if len(asked) <= times:
            raise QueueFull(1, retry_after_s)
        submit(request)

    running.engine.submit = refuse  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (AWAY, True),
        (FULL, True),
        (ResourceExhausted("RESOURCE_EXHAUSTED", "message too large"), False),
        (InvalidArgument("INVALID_ARGUMENT", "wrong"), False),
        (DeadlineExceeded("DEADLINE_EXCEEDED", "late"), False),
        (AlreadyRunning("ALREADY_EXISTS", "mine"), False),
        (ServerError("INTERNAL", "broken"), False),
    ],
)
def test_what_is_tried_again(error: ServerError, again: bool) -> None:
    assert (Retry().wait_s(error, 1, 100.0) is not None) == again
    assert NEVER.wait_s(error, 1, 100.0) is None


def test_a_name_still_in_use_is_waited_for_only_after_a_lost_connection() -> None:
    mine = AlreadyRunning("ALREADY_EXISTS", "mine")
    assert Retry().wait_s(mine, 2, 100.0, AWAY) is not None
    assert Retry().wait_s(mine, 2, 100.0, FULL) is None


def test_waits_grow_are_spread_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    policy = Retry(attempts=7, first_s=0.1, longest_s=0.5)
    assert [policy.wait_s(AWAY, n, 100.0) for n in range(1, 8)] == [0.1, 0.2, 0.4, 0.5, 0.5, 0.5, None]
    assert policy.wait_s(FULL, 1, 100.0) == 2.1
    assert policy.wait_s(FULL, 1, 2.05) is None  # it would end after the deadline
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: low)
    assert policy.wait_s(AWAY, 1, 100.0) == 0.0
    assert policy.wait_s(FULL, 1, 100.0) == 2.0


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first_s": -1.0}, {"first_s": 9.0}])
def test_a_wrong_retry_names_its_field(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retry(**wrong)  # type: ignore[arg-type]


async def test_a_full_queue_is_waited_for_as_long_as_it_says(launch: Launch) -> None:
    running = await launch()
    asked = full_for(running, 2, 0.15)
    async with Client(running.address, retry=QUICK) as client:
        assert (await client.complete("hi")).text == "hello world"
    first, second, third = asked
    assert second - first >= 0.15
    assert third - second >= 0.15


async def test_a_server_that_comes_back_is_found(launch: Launch) -> None:
    running = await launch()
    running.server.service.draining = True
    async with Client(running.address, retry=QUICK) as client:
        call = asyncio.ensure_future(client.complete("hi", request_id="mine"))
        await asyncio.sleep(0.05)
        assert not call.done()
        running.server.service.draining = False
        assert (await call).text == "hello world"


async def test_no_text_is_started_over(launch: Launch) -> None:
    running = await launch(eos=False, gate=(gate := threading.Semaphore(1)))

    def fail() -> None:
        if running.engine.rounds:
            raise RuntimeError("broken on purpose")

    running.engine.before_step = fail
    async with Client(running.address, retry=QUICK) as client:
        events = client.generate("hi", Options(max_tokens=400))
        assert isinstance(await anext(events), Started)
        gate.release(1)
        with pytest.raises(Unavailable) as lost:
            async for _ in events:
                pass
    assert lost.value.attempts == 1
    assert len(running.engine.seen) == 1


async def test_tries_and_waits_share_one_deadline(launch: Launch) -> None:
    running = await launch()
    asked = full_for(running, 99, 0.2)
    began = time.monotonic()
    async with Client(running.address, retry=QUICK) as client:
        with pytest.raises(ResourceExhausted) as full:
            await client.complete("hi", timeout_s=0.5)
    assert time.monotonic() - began < 0.5  # the wait that would have been in vain is left out
    assert full.value.attempts == len(asked) <= 3
    async with Client("127.0.0.1:1", retry=Retry(attempts=99, first_s=0.01, longest_s=0.02)) as nobody:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await asyncio.wait_for(nobody.info(timeout_s=0.3), 5)


async def test_a_missed_deadline_has_a_name_and_frees_the_engine(launch: Launch) -> None:
    running = await launch(gate=(gate := threading.Semaphore(0)))
    async with Client(running.address) as client:
        with pytest.raises(DeadlineExceeded) as late:
            await client.complete("hi", request_id="mine", timeout_s=0.2)
    assert late.value.request_id == "mine"
    await until(lambda: not running.server.service.active)
    gate.release(1)
    await until(lambda: not running.engine.running)


@pytest.mark.parametrize("way", ["task", "break", "aclose", "client"])
async def test_who_stops_reading_frees_the_engine_within_a_round(launch: Launch, way: str) -> None:
    gate = threading.Semaphore(0)
    running = await launch(eos=False, gate=gate)
    client = Client(running.address)
    ended = ""

    async def read() -> None:
        nonlocal ended
        events = client.generate("hi", Options(max_tokens=400))
        try:
            if way == "aclose":
                async with aclosing(events):
                    await anext(events)
                return
            async for _ in events:
                if way == "break":
                    break
        except Cancelled:
            ended = "closed"

    task = asyncio.ensure_future(read())
    await until(lambda: bool(running.engine.seen))
    gate.release(1)  # the first round: its delta is the first event
    await until(lambda: running.engine.rounds == 1)
    if way == "task":
        task.cancel()
    elif way == "client":
        await client.close()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled() == (way == "task")
    assert ended == ("closed" if way == "client" else "")
    await until(lambda: not running.server.service.active)
    gate.release(1)  # the round that was under way when the cancellation came
    await until(lambda: bool(running.engine.cancelled))
    assert not running.engine.running
    assert running.engine.rounds <= 2
    await client.close()


async def test_a_closed_client_says_so(launch: Launch) -> None:
    running = await launch()
    client = Client(running.address)
    await client.close()
    with pytest.raises(Cancelled, match="closed"):
        await client.info()
    with pytest.raises(Cancelled, match="closed"):
        await client.complete("hi")


async def test_calls_go_to_all_servers_of_a_name_in_turn(launch: Launch) -> None:
    first, second = await launch(), await launch()
    ports = [running.address.rsplit(":", 1)[1] for running in (first, second)]
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    async with Client(target) as client:
        while not (first.engine.seen and second.engine.seen):  # until both connections stand
            await client.complete("hi", timeout_s=20)
        first.engine.seen.clear()
        second.engine.seen.clear()
        for _ in range(8):
            await client.complete("hi")
        assert len(first.engine.seen) == len(second.engine.seen) == 4
        await first.server.stop(0)
        for _ in range(8):
            await client.complete("hi")
        assert len(second.engine.seen) == 12


async def test_names_are_looked_up(launch: Launch) -> None:
    running = await launch()
    async with Client(f"dns:///localhost:{running.address.rsplit(':', 1)[1]}") as client:
        assert (await client.complete("hi", timeout_s=20)).text == "hello world"


def test_every_error_is_a_server_error_of_its_code() -> None:
    for status in grpc.StatusCode:
        error = make_error(status.name, "why", request_id="mine")
        assert (error.code, error.message, error.request_id) == (status.name, "why", "mine")
    assert isinstance(make_error("UNAVAILABLE", ""), Unavailable)
    assert type(make_error("DATA_LOSS", "")) is ServerError


def test_details_that_are_none_do_no_harm() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"), ("x-request-id", "theirs"))
    failed = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, details="gone")
    error = to_error(failed, "mine")
    assert (error.code, error.message, error.request_id) == ("UNAVAILABLE", "gone", "theirs")
