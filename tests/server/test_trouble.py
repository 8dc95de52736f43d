"""Cancelled, late, stalled and failing: nothing leaks and nobody else is hurt."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.config import EngineConfig
from engine.errors import QueueFull
from engine.messages import EndConditions, Request
from server.engine_loop import MAX_FAILURES
from server.service import SERVICE_NAME
from server.worker import Worker
from tests.server import fake_engine
from tests.server.conftest import Launch, until
from tests.server.test_service import collect, refused

ENDLESS = {"eos": False, "reply": "hello world, " * 20}
LONG = wire.GenerateRequest(text="hi", max_tokens=500)


async def test_a_cancelled_call_leaves_nothing_behind(launch: Launch) -> None:
    gate = threading.Semaphore(2)
    running = await launch(gate=gate, **ENDLESS)
    call = running.stub.Generate(LONG)
    await call.read()
    call.cancel()
    await until(lambda: not running.server.service.active)
    gate.release(1)
    await until(lambda: not running.engine.running)
    assert len(running.engine.cancelled) == 1


async def test_a_deadline_ends_the_call(launch: Launch) -> None:
    gate = threading.Semaphore(1)
    running = await launch(gate=gate, **ENDLESS)
    error, _ = await refused(running.stub.Generate(LONG, timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not running.server.service.active)
    gate.release(1)
    await until(lambda: not running.engine.running)


async def test_a_storm_of_calls_leaves_nothing_behind(launch: Launch) -> None:
    running = await launch(max_queue=100, **ENDLESS)

    async def one(number: int) -> None:
        call = running.stub.Generate(LONG)
        for _ in range(number % 7):
            await call.read()
        call.cancel()

    await asyncio.gather(*(one(number) for number in range(60)))
    await until(lambda: not running.server.service.active and not running.engine.running)
    assert (await running.stub.GetModelInfo(wire.GetModelInfoRequest())).load.pages_free == 64


async def test_an_engine_failure_is_unavailable_and_passes(launch: Launch) -> None:
    failures = [RuntimeError("boom")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    running = await launch(before_step=fail_once)
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi", request_id="hurt")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details["RequestInfo"].request_id == "hurt"
    assert "boom" not in (error.details() or "")
    assert await collect(running, wire.GenerateRequest(text="hi"))


async def test_readiness_follows_the_engine(launch: Launch) -> None:
    failures = [RuntimeError("boom")] * MAX_FAILURES

    def fail_at_first() -> None:
        if failures:
            raise failures.pop()

    running = await launch(before_step=fail_at_first)
    health = health_pb2_grpc.HealthStub(running.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    for _ in range(MAX_FAILURES):
        error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "RetryInfo" in details
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert await collect(running, wire.GenerateRequest(text="hi"))


async def test_a_bug_of_ours_is_internal_and_says_nothing_of_itself(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await launch()

    def fail(*_: object, **__: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr("server.service.to_request", fail)
    error, _ = await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")


async def test_a_client_that_stops_reading_is_ended(launch: Launch) -> None:
    gate = threading.Semaphore(0)
    running = await launch(stall_s=0.3, max_model_len=100_000, gate=gate, **ENDLESS)
    # Alternatives make messages large, so that the transport's own buffers fill.
    heavy = wire.GenerateRequest(text="hi", max_tokens=90_000, logprobs=20)
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(running.address, options=options) as channel:
        stalled = wire_grpc.GenerationServiceStub(channel).Generate(heavy)
        gate.release(100_000)
        await until(lambda: not running.engine.running and bool(running.engine.cancelled))
        assert await collect(running, wire.GenerateRequest(text="hi", max_tokens=20))
        await until(lambda: not running.server.service.active)
        error, _ = await refused(stalled)
        assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)


async def test_draining_finishes_what_runs_and_refuses_the_rest(launch: Launch) -> None:
    gate = threading.Semaphore(2)
    running = await launch("hello world, hello there", gate=gate)
    health = health_pb2_grpc.HealthStub(running.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    call = running.stub.Generate(wire.GenerateRequest(text="hi")).__aiter__()
    await anext(call)
    stopping = asyncio.ensure_future(running.server.stop(5.0))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    liveness = await health.Check(health_pb2.HealthCheckRequest(service=""))
    assert liveness.status == health_pb2.HealthCheckResponse.SERVING
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
    gate.release(100)
    messages = [message async for message in call]
    assert messages[-1].WhichOneof("event") == "finished"
    await asyncio.wait_for(stopping, 5)


async def test_what_does_not_finish_in_time_is_told_to_go_elsewhere(launch: Launch) -> None:
    gate = threading.Semaphore(2)
    running = await launch(gate=gate, **ENDLESS)
    call = running.stub.Generate(LONG).__aiter__()
    await anext(call)
    stopping = asyncio.ensure_future(running.server.stop(0.2))
    error, details = await refused(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in (error.details() or "")
    assert "RetryInfo" in details
    await asyncio.wait_for(stopping, 10)


class _Gone:
    """What a handler sees of a caller who has just left: gRPC fails the write before it cancels the handler."""

    async def write(self, message: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    async def abort(self, *arguments: object, **more: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    def set_trailing_metadata(self, metadata: object) -> None: ...
    def time_remaining(self) -> float | None:
        return None


@pytest.mark.parametrize(
    ("request_", "status"),
    [(wire.GenerateRequest(text="hi"), "CANCELLED"), (wire.GenerateRequest(), "INVALID_ARGUMENT")],
    ids=["write", "abort"],
)
async def test_a_caller_who_left_is_no_failure_of_ours(
    launch: Launch, caplog: pytest.LogCaptureFixture, request_: wire.GenerateRequest, status: str
) -> None:
    caplog.set_level("INFO")
    running = await launch()
    with pytest.raises(asyncio.CancelledError):
        await running.server.service.Generate(request_, _Gone())
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert (record.levelname, record.fields["status"], bool(record.exc_info)) == ("INFO", status, False)
    await until(lambda: not running.server.service.active and not running.engine.running)


async def test_a_full_server_says_so_without_waiting_for_the_round(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is deep in a round, and hears nothing."""
    few = EngineConfig(model="scripted", max_running=2, max_queue=1)
    monkeypatch.setattr(fake_engine, "CONFIG", few)
    gate = threading.Semaphore(0)
    running = await launch(gate=gate, max_queue=100)
    first = [asyncio.ensure_future(collect(running, wire.GenerateRequest(text="hi"))) for _ in range(3)]
    await until(lambda: len(running.server.service.active) == 3)
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
    first[0].cancel()
    await until(lambda: len(running.server.service.active) == 2)
    first[0] = asyncio.ensure_future(collect(running, wire.GenerateRequest(text="hi")))
    await until(lambda: len(running.server.service.active) == 3)
    gate.release(10_000)
    assert all([(await each)[-1].WhichOneof("event") == "finished" for each in first])
    assert await collect(running, wire.GenerateRequest(text="hi"))


async def test_a_reader_behind_holds_no_place_once_the_engine_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine, "CONFIG", EngineConfig(model="scripted", max_running=1, max_queue=1))
    worker = Worker(lambda: fake_engine.EngineThread(fake_engine.ScriptedEngine([1]), fake_engine.info(10, 100)))
    await worker.start()
    try:
        request = Request("r", (1,), EndConditions(1))
        unread = [worker.open(request), worker.open(request)]
        with pytest.raises(QueueFull):
            worker.check_room()
        await until(lambda: _has_room(worker))
        assert [await stream.read() for stream in unread]
    finally:
        await worker.stop()


def _has_room(worker: Worker) -> bool:
    try:
        worker.check_room()
    except QueueFull:
        return False
    return True
