"""Large and hostile messages: refused by name, before the engine hears of them."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire

from server.bounds import MAX_MESSAGES, Bounds
from tests.server.conftest import Launch
from tests.server.test_service import collect, refused

SMALL = {"bounds": Bounds(message_bytes=64 * 1024, prompt_bytes=4000, prompt_tokens=100)}
CHAT = [wire.ChatMessage(role="user", content="x" * 600)] * 8


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (wire.GenerateRequest(text="x " * 2500), "text"),
        (wire.GenerateRequest(text="é" * 3000), "text"),
        (wire.GenerateRequest(text="x 1 " * 200), "text"),
        (wire.GenerateRequest(token_ids=wire.TokenIds(ids=[1] * 101)), "token_ids"),
        (wire.GenerateRequest(chat=wire.Chat(messages=CHAT)), "chat"),
        (wire.GenerateRequest(chat=wire.Chat(messages=[wire.ChatMessage()] * (MAX_MESSAGES + 1))), "chat.messages"),
        (wire.GenerateRequest(text="x", stop=["x"] * 20_000), "stop"),
        (wire.GenerateRequest(text="x", stop_token_ids=[1] * 20_000), "stop_token_ids"),
        (wire.GenerateRequest(text="x", sampling=wire.Sampling(logit_bias=dict.fromkeys(range(3000), 1.0))),
         "sampling.logit_bias"),
    ],
    ids=["bytes", "bytes of characters", "tokens", "ids", "chat", "messages", "stops", "stop ids", "bias"],
)  # fmt: skip
async def test_what_is_too_large_is_named(launch: Launch, request_: wire.GenerateRequest, field: str) -> None:
    running = await launch(max_model_len=100_000, serving=SMALL)
    error, details = await refused(running.stub.Generate(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details["BadRequest"].field_violations] == [field]
    assert not running.engine.seen


async def test_what_just_fits_is_served(launch: Launch) -> None:
    running = await launch(max_model_len=100_000, serving=SMALL)
    await collect(running, wire.GenerateRequest(token_ids=wire.TokenIds(ids=[1] * 100)))
    assert (await running.stub.Tokenize(wire.TokenizeRequest(text="x " * 2000))).token_ids
    error, details = await refused(running.stub.Tokenize(wire.TokenizeRequest(text="x " * 2001)))
    assert details["BadRequest"].field_violations[0].field == "text"
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    error, details = await refused(running.stub.Detokenize(wire.DetokenizeRequest(token_ids=[1] * 100_001)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # larger than the server takes at all


async def test_messages_and_metadata_have_a_size(launch: Launch) -> None:
    running = await launch(serving=SMALL)
    error, _ = await refused(running.stub.Generate(wire.GenerateRequest(text="x" * 100_000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    fat = (("x-fat", "y" * 40_000),)
    error, _ = await refused(running.stub.Generate(wire.GenerateRequest(text="x"), metadata=fat))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await collect(running, wire.GenerateRequest(text="hi"))


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x02\xff\xfe"], ids=["tag", "length", "utf-8"]
)
async def test_what_cannot_be_decoded_is_the_clients_mistake(launch: Launch, data: bytes) -> None:
    running = await launch()
    calls: list[Any] = [
        running.channel.unary_stream("/dspark.v1.GenerationService/Generate")(data),
        running.channel.unary_unary("/dspark.v1.GenerationService/Detokenize")(b"\xff" + data),
        running.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff" + data),
        running.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff" + data),
        running.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
            iter([b"\xff" + data])
        ),
    ]
    for call in calls:
        error, details = await refused(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details["RequestInfo"].request_id
    assert await collect(running, wire.GenerateRequest(text="hi"))


async def test_deep_nesting_is_refused(launch: Launch) -> None:
    from tests.fuzz.messages import nested

    running = await launch()
    for depth in (40, 90, 5000):
        error, _ = await refused(running.channel.unary_stream("/dspark.v1.GenerationService/Generate")(nested(depth)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
