"""Calls of methods that there are not: an answer for the caller, and nothing for anybody else to notice."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import scheduler_pb2 as scheduler
from dspark.v1 import scheduler_pb2_grpc as scheduler_grpc

from server.access import Access
from tests.fuzz.wire import call_of, strike
from tests.server.conftest import Launch, until
from tests.server.test_service import collect, refused

NO_TEXT = (b"/\xd2\x085\xd8/x", b"\xff", b"/dspark.v1.GenerationService/\xc3\x28")
TOKEN = "s3cr3t-0123456789abcdef"


async def call(address: str, path: bytes) -> None:
    host, _, port = address.rpartition(":")
    await strike(host, int(port), call_of(path), patience_s=0.2)


@pytest.mark.parametrize("path", NO_TEXT)
async def test_a_path_that_is_no_text_costs_nobody_anything(launch: Launch, path: bytes) -> None:
    gate = threading.Semaphore(2)
    running = await launch("hello world, " * 5, eos=False, gate=gate)
    request = wire.GenerateRequest(text="hi", max_tokens=20)
    begun = running.stub.Generate(request).__aiter__()
    assert (await anext(begun)).WhichOneof("event") == "started"
    for _ in range(3):
        await call(running.address, path)
    gate.release(1000)
    assert [message async for message in begun][-1].finished.usage.completion_tokens == 20
    assert (await collect(running, request))[-1].WhichOneof("event") == "finished"
    await until(lambda: not running.server.service.active)


async def test_at_the_schedulers_own_address_too(launch: Launch) -> None:
    running = await launch(admin=("127.0.0.1", 0))
    address = f"127.0.0.1:{running.server.admin_port}"
    await call(address, NO_TEXT[0])
    async with grpc.aio.insecure_channel(address) as channel:
        stub = scheduler_grpc.SchedulerServiceStub(channel)
        assert (await stub.GetPolicy(scheduler.GetPolicyRequest())).names


@pytest.mark.parametrize("path", ["/dspark.v1.GenerationService/Guess", "/nobody.Knows/This", "/", "/é"])
async def test_an_unknown_method_is_unimplemented(launch: Launch, path: str) -> None:
    running = await launch()
    calls = [running.channel.unary_unary(path)(b"x"), running.channel.unary_stream(path)(b"x")]
    for one in [*calls, running.channel.stream_stream(path)(iter(()))]:
        error, _ = await refused(one)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_many_at_once_and_those_who_leave(launch: Launch) -> None:
    running = await launch()
    method = running.channel.unary_unary("/nobody.Knows/This")
    calls = [method(b"x") for _ in range(200)]
    for one in calls[::2]:
        one.cancel()
    codes = await asyncio.gather(*(one.code() for one in calls))
    assert set(codes[1::2]) == {grpc.StatusCode.UNIMPLEMENTED}
    assert await collect(running, wire.GenerateRequest(text="hi"))


async def test_without_a_token_nobody_learns_what_there_is(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[[token]]\nname = "a"\ntoken = "{TOKEN}"\n')
    running = await launch(serving={"access": Access(path)})
    method = running.channel.unary_unary("/nobody.Knows/This")
    error, _ = await refused(method(b""))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    error, _ = await refused(method(b"", metadata=(("authorization", f"Bearer {TOKEN}"),)))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_it_can_be_stopped_right_after(launch: Launch) -> None:
    running = await launch()
    await call(running.address, NO_TEXT[0])
    await asyncio.wait_for(running.server.stop(0.2), 30)
