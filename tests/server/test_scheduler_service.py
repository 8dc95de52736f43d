"""SchedulerService over a real channel, around a scripted engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from dspark.v1 import generation_pb2 as generation
from dspark.v1 import scheduler_pb2 as wire
from dspark.v1 import scheduler_pb2_grpc as wire_grpc
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.messages import EndConditions, Request
from server.boundary import Watch
from server.options import Admin
from server.scheduler_service import SERVICE_NAME
from server.worker import Worker
from tests.server.conftest import Launch, Running, until
from tests.server.fake_engine import EngineThread, ScriptedEngine, info
from tests.server.test_service import collect, refused


def stub(running: Running) -> Any:
    return wire_grpc.SchedulerServiceStub(running.channel)


async def generate(running: Running, tokens: int) -> None:
    await collect(running, generation.GenerateRequest(text="hi", request_id="mine", max_tokens=tokens))


async def test_a_watcher_sees_every_round_that_follows(launch: Launch) -> None:
    running = await launch("hello " * 30, eos=False)
    call = stub(running).WatchRounds(wire.WatchRoundsRequest(request_id="w"))
    await until(lambda: running.engine.history.observer is not None)
    await generate(running, 31)
    messages, records = [], []
    while len(records) < 11:
        messages.append(await call.read())
        records += messages[-1].records
    assert [record.round for record in records] == list(range(1, 12))
    assert {(message.request_id, message.lost) for message in messages} == {("w", 0)}
    last = records[-1]
    assert (last.policy, last.stop, last.verified, last.accepted) == ("auto", wire.STOP_RULE, 2, 2)
    (request,) = last.requests
    assert (request.request_id, request.sitting) == ("mine", wire.SITTING_ASKED)
    assert list(request.survival) == [0.5] * 3
    assert last.ended_s > 1.7e9
    call.cancel()
    await until(lambda: running.engine.history.observer is None)


async def test_history_sampling_and_summaries(launch: Launch) -> None:
    running = await launch("hello " * 30, eos=False)
    await generate(running, 31)
    request = wire.WatchRoundsRequest(history=3, every=2, summaries=True)
    call = stub(running).WatchRounds(request)
    first = await call.read()
    assert [record.round for record in first.records] == [6, 8, 10]
    assert not any(record.requests for record in first.records)
    assert not first.records[0].HasField("ended_s")
    await until(lambda: running.engine.history.observer is not None)
    await generate(running, 10)
    numbers: list[int] = []
    while len(numbers) < 2:
        numbers += [record.round for record in (await call.read()).records]
    assert numbers == [12, 14]
    call.cancel()


async def test_a_watcher_that_stops_reading_is_told_what_it_lost(launch: Launch) -> None:
    running = await launch("hello " * 30, eos=False, block=1)
    call = stub(running).WatchRounds(wire.WatchRoundsRequest(buffer=1))
    await until(lambda: running.engine.history.observer is not None)
    # A write to a reader who does not read succeeds until buffers on the way are full, so many rounds are needed.
    for _ in range(12):
        await generate(running, 450)
    got = lost = 0
    while got + lost < running.engine.rounds:
        message = await asyncio.wait_for(call.read(), 10)
        got, lost = got + len(message.records), lost + message.lost
    assert lost > 0
    assert got + lost == running.engine.rounds
    call.cancel()


async def test_the_policy_changes_and_can_go_back(launch: Launch) -> None:
    running = await launch()
    before = await stub(running).GetPolicy(wire.GetPolicyRequest(request_id="p"))
    assert (before.request_id, before.policy) == ("p", before.initial)
    assert not before.policy.HasField("draft_tokens")
    assert (before.policy.name, before.policy.max_running, len(before.names)) == ("auto", 64, 6)
    update = wire.UpdatePolicyRequest(policy=wire.Policy(name="fixed", draft_tokens=0, max_queue=3))
    after = (await stub(running).UpdatePolicy(update)).policy
    assert (after.name, after.draft_tokens, after.max_queue) == ("fixed", 0, 3)
    assert after.HasField("draft_tokens")
    assert after.max_running == 64
    assert (await running.stub.GetModelInfo(generation.GetModelInfoRequest())).policy == "fixed"
    update = wire.UpdatePolicyRequest(
        policy=wire.Policy(name="threshold", max_queue=9), update_mask=FieldMask(paths=["name", "draft_tokens"])
    )
    after = (await stub(running).UpdatePolicy(update)).policy
    assert (after.name, after.HasField("draft_tokens"), after.max_queue) == ("threshold", False, 3)


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (wire.UpdatePolicyRequest(), ["policy"]),
        (wire.UpdatePolicyRequest(policy=wire.Policy(name="clever")), ["policy.name"]),
        (
            wire.UpdatePolicyRequest(policy=wire.Policy(draft_tokens=5, confidence_threshold=float("nan"))),
            ["policy.draft_tokens", "policy.confidence_threshold"],
        ),
        (wire.UpdatePolicyRequest(policy=wire.Policy(max_running=65)), ["policy.max_running"]),
        (wire.UpdatePolicyRequest(policy=wire.Policy(prefill_chunk=10**6)), ["policy.prefill_chunk"]),
        (wire.UpdatePolicyRequest(policy=wire.Policy(max_queue=0)), ["policy.max_queue"]),
        (wire.UpdatePolicyRequest(update_mask=FieldMask(paths=["name", "speed"])), ["update_mask.paths[1]"]),
    ],
    ids=str,
)
async def test_a_bad_update_is_named_and_changes_nothing(
    launch: Launch, request_: wire.UpdatePolicyRequest, fields: list[str]
) -> None:
    running = await launch()
    error, details = await refused(stub(running).UpdatePolicy(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details["BadRequest"].field_violations] == fields
    answer = await stub(running).GetPolicy(wire.GetPolicyRequest())
    assert answer.policy == answer.initial


async def test_bad_watches_are_named(launch: Launch) -> None:
    running = await launch()
    for request in (wire.WatchRoundsRequest(buffer=0), wire.WatchRoundsRequest(history=513)):
        error, details = await refused(stub(running).WatchRounds(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations


async def test_a_new_engine_is_told_what_the_old_one_was() -> None:
    def die() -> None:
        raise RuntimeError("boom")

    engines = [ScriptedEngine([1], before_step=die), ScriptedEngine([1, 2, 3], gate=threading.Semaphore(0))]
    to_come = iter(engines)
    worker = Worker(lambda: EngineThread(next(to_come), info(100)))
    await worker.start()
    await worker.update_policy({"policy": "fixed", "draft_tokens": 1})
    watcher = worker.rounds.open(every=2)
    for _ in range(3):
        stream = worker.open(Request("r", (1,), EndConditions(7)))
        with pytest.raises(RuntimeError):
            await stream.read()
    await until(lambda: worker.ready and engines[1].history.observer is not None)
    assert (await worker.policy()).policy == "fixed"
    assert engines[1].gate is not None
    engines[1].gate.release(100)
    worker.open(Request("r", (1,), EndConditions(7)))
    assert (await watcher.read())[0][0]["policy"] == "fixed"
    worker.rounds.leave(watcher)
    await until(lambda: engines[1].history.observer is None)
    await worker.stop()


async def test_nothing_is_asked_of_the_engine_before_somebody_watches(launch: Launch) -> None:
    running = await launch()
    sent: list[Any] = []
    engine = running.server._worker._engine
    original, engine.send = engine.send, lambda message: (sent.append(message), original(message))  # type: ignore[method-assign, assignment]
    await generate(running, 7)
    assert not any(isinstance(message, Watch) for message in sent)


@pytest.mark.parametrize("admin", [Admin.SHARED, Admin.OFF, ("127.0.0.1", 0)])
async def test_access_can_be_kept_apart(launch: Launch, admin: Any) -> None:
    running = await launch(admin=admin)
    ask, health = wire.GetPolicyRequest(), health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    if admin is Admin.SHARED:
        assert (await stub(running).GetPolicy(ask)).policy.name == "auto"
        assert (await health_pb2_grpc.HealthStub(running.channel).Check(health)).status == 1
        return
    error, _ = await refused(stub(running).GetPolicy(ask))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert running.server.admin_port == 0 if admin is Admin.OFF else running.server.admin_port > 0
    if admin is not Admin.OFF:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as channel:
            assert (await wire_grpc.SchedulerServiceStub(channel).GetPolicy(ask)).policy.name == "auto"
            assert (await health_pb2_grpc.HealthStub(channel).Check(health)).status == 1
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await running.stub.__class__(channel).GetModelInfo(generation.GetModelInfoRequest())


async def test_a_watch_ends_with_the_server(launch: Launch) -> None:
    running = await launch()
    call = stub(running).WatchRounds(wire.WatchRoundsRequest())
    await until(lambda: running.engine.history.observer is not None)
    await running.server.stop(5.0)
    error, _ = await refused(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
