"""The service over a real channel, around a scripted engine."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.checkpoint import Checkpoint
from server.logs import _JsonLines
from server.service import SERVICE_NAME
from tests.server.conftest import Launch, Running, until

REPLY = "hello world, naïve 漢字 🙂 done"


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    caplog.set_level(logging.INFO, "dspark.server")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(_JsonLines().format(r)) for r in caplog.records if r.name == "dspark.server"]

    return lines


async def collect(running: Running, request: wire.GenerateRequest, **options: Any) -> list[wire.GenerateResponse]:
    return [message async for message in running.stub.Generate(request, **options)]


async def exhaust(call: Any) -> None:
    async for _ in call:
        pass


async def refused(call: Any) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error of a call, and its details by message name."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await (exhaust(call) if hasattr(call, "__aiter__") else call)
    metadata = dict(error.value.trailing_metadata() or ())
    details: dict[str, Any] = {"x-request-id": metadata.get("x-request-id")}
    if "grpc-status-details-bin" in metadata:
        for packed in status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details:
            name = packed.TypeName().rsplit(".", 1)[-1]
            detail = getattr(error_details_pb2, name)()
            packed.Unpack(detail)
            details[name] = detail
    return error.value, details


async def test_text_streams(launch: Launch, log_lines: Any) -> None:
    running = await launch(REPLY)
    call = running.stub.Generate(wire.GenerateRequest(text="hi", request_id="mine"))
    messages = [message async for message in call]
    assert "".join(m.delta.text for m in messages) == REPLY
    assert {m.request_id for m in messages} == {"mine"}
    assert messages[-1].finished.reason == wire.FINISH_REASON_STOP_TOKEN
    assert messages[0].started.cached_tokens == 2
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
    (line,) = [line for line in log_lines() if line["event"] == "request"]
    assert (line["request_id"], line["status"], line["finish_reason"]) == ("mine", "OK", "stop_token")
    assert line["completion_tokens"] == messages[-1].finished.usage.completion_tokens
    assert line["acceptance_by_position"] == [1.0, 1.0]


async def test_the_server_names_nameless_calls(launch: Launch) -> None:
    running = await launch()
    messages = await collect(running, wire.GenerateRequest(text="hi"))
    assert len({m.request_id for m in messages}) == 1
    assert messages[0].request_id


async def test_stop_strings_end_the_call_and_free_the_engine(launch: Launch) -> None:
    gate = threading.Semaphore(5)
    running = await launch("hello world, " * 20, eos=False, gate=gate)
    messages = await collect(running, wire.GenerateRequest(text="hi", stop=["ld, he"], max_tokens=400))
    assert "".join(m.delta.text for m in messages) == "hello wor"
    assert messages[-1].finished.stop_string == "ld, he"
    gate.release(1)  # the round under way, after which cancellations are read
    await until(lambda: not running.engine.running)
    assert len(running.engine.cancelled) == 1


async def test_prompts_by_text_ids_and_chat(launch: Launch, checkpoint: Checkpoint) -> None:
    running = await launch()
    encode = checkpoint.tokenizer.encode
    await collect(running, wire.GenerateRequest(text="hello"))
    await collect(running, wire.GenerateRequest(token_ids=wire.TokenIds(ids=[5, 6])))
    chat = wire.Chat(messages=[wire.ChatMessage(role="user", content="hi")])
    chat.template_arguments.update({"thinking": 3})
    await collect(running, wire.GenerateRequest(chat=chat))
    prompts = [list(request.prompt) for request in running.engine.seen]
    assert prompts == [encode("hello"), [5, 6], encode("<|start|>user\nhi<|end|>\n<|start|>assistant\n[3]")]
    tokenized = await running.stub.Tokenize(wire.TokenizeRequest(chat=chat, request_id="t"))
    assert list(tokenized.token_ids) == prompts[2]
    assert (tokenized.request_id, b"".join(tokenized.pieces)[:9]) == ("t", b"<|start|>")


async def test_tokenize_and_detokenize_are_inverse(launch: Launch) -> None:
    running = await launch()
    ids = (await running.stub.Tokenize(wire.TokenizeRequest(text=REPLY))).token_ids
    answer = await running.stub.Detokenize(wire.DetokenizeRequest(token_ids=[*ids, 0]))
    assert answer.text == REPLY
    shown = await running.stub.Detokenize(wire.DetokenizeRequest(token_ids=[0], skip_special_tokens=False))
    assert shown.text == "<|end|>"
    long = await running.stub.Tokenize(wire.TokenizeRequest(text="hello " * 3000))
    assert len(long.token_ids) > 3000


async def test_model_info(launch: Launch) -> None:
    running = await launch()
    info = await running.stub.GetModelInfo(wire.GetModelInfoRequest(request_id="i"))
    assert (info.request_id, info.model, info.drafter.kind, info.drafter.block_size) == ("i", "scripted", "dspark", 4)
    assert (info.default_sampling.temperature, info.has_chat_template) == (0.6, True)
    assert (info.load.pages_total, list(info.eos_token_ids)) == (64, [0])


CHAT = wire.ChatMessage(role="user", content="hi")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wire.GenerateRequest(), "prompt"),
        (wire.GenerateRequest(text=""), "text"),
        (wire.GenerateRequest(text="x " * 600), "text"),
        (wire.GenerateRequest(text="x" * 1_000_000), "text"),
        (wire.GenerateRequest(token_ids=wire.TokenIds()), "token_ids"),
        (wire.GenerateRequest(token_ids=wire.TokenIds(ids=[1, 2, 10**9])), "token_ids.ids[2]"),
        (wire.GenerateRequest(token_ids=wire.TokenIds(ids=[13])), "token_ids"),
        (wire.GenerateRequest(chat=wire.Chat()), "chat.messages"),
        (wire.GenerateRequest(chat=wire.Chat(messages=[wire.ChatMessage(content="x")])), "chat.messages[0].role"),
        (wire.GenerateRequest(chat=wire.Chat(messages=[wire.ChatMessage(role="villain")])), "chat.messages"),
        (wire.GenerateRequest(text="x", sampling=wire.Sampling(temperature=float("nan"))), "sampling.temperature"),
        (wire.GenerateRequest(text="x", max_tokens=0), "max_tokens"),
        (wire.GenerateRequest(text="x", request_id="two words"), "request_id"),
    ],
    ids=str,
)
async def test_a_clients_mistake_is_named(launch: Launch, request_: wire.GenerateRequest, field: str) -> None:
    running = await launch()
    error, details = await refused(running.stub.Generate(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details["BadRequest"].field_violations] == [field]
    assert details["RequestInfo"].request_id == details["x-request-id"]
    assert not running.server.service.active


async def test_mistakes_in_the_other_calls(launch: Launch) -> None:
    running = await launch()
    for call in (
        running.stub.Tokenize(wire.TokenizeRequest()),
        running.stub.Detokenize(wire.DetokenizeRequest(token_ids=[10**6])),
        running.stub.GetModelInfo(wire.GetModelInfoRequest(request_id="é")),
    ):
        error, details = await refused(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations


async def test_chat_arguments_cannot_shadow_the_conversation(launch: Launch) -> None:
    running = await launch()
    chat = wire.Chat(messages=[CHAT])
    chat.template_arguments.update({"messages": []})
    _, details = await refused(running.stub.Generate(wire.GenerateRequest(chat=chat)))
    assert details["BadRequest"].field_violations[0].field == "chat.template_arguments.messages"


async def test_a_full_queue_says_when_to_retry(launch: Launch) -> None:
    running = await launch(max_queue=0)
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 2500


async def test_a_running_id_cannot_be_used_twice(launch: Launch) -> None:
    gate = threading.Semaphore(0)
    running = await launch(gate=gate)
    first = asyncio.ensure_future(collect(running, wire.GenerateRequest(text="hi", request_id="twin")))
    await until(lambda: bool(running.server.service.active))
    error, details = await refused(running.stub.Generate(wire.GenerateRequest(text="hi", request_id="twin")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert details["ResourceInfo"].resource_name == "twin"
    gate.release(100)
    assert (await first)[-1].WhichOneof("event") == "finished"
    await collect(running, wire.GenerateRequest(text="hi", request_id="twin"))


async def test_health_and_reflection(launch: Launch) -> None:
    running = await launch()
    health = health_pb2_grpc.HealthStub(running.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", SERVICE_NAME):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == serving
    reflection = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for answer in call:
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names
