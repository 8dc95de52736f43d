"""Spans as a collector receives them: calls, generations, rounds."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from server.problems import cut_off
from server.telemetry import Telemetry, from_environment
from tests.server.conftest import Launch, until
from tests.server.otlp import Collector, plain
from tests.server.test_service import collect, log_lines, refused  # noqa: F401  # a fixture
from tests.server.test_trouble import ENDLESS, LONG

GENERATE = "dspark.v1.GenerationService/Generate"
COMPLETION = "text_completion scripted"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ERROR = trace_pb2.Status.STATUS_CODE_ERROR
UNSET = trace_pb2.Status.STATUS_CODE_UNSET

pytestmark = pytest.mark.usefixtures("collector")  # first, so that it outlives the servers


def parent(flags: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{TRACE}-{PARENT}-{flags}"),)


async def spans(collector: Collector, name: str, count: int = 1) -> list[trace_pb2.Span]:
    await until(lambda: len(collector.named(name)) >= count)
    assert len(collector.named(name)) == count
    return collector.named(name)


async def test_a_call_continues_the_callers_trace(launch: Launch, collector: Collector, telemetry: Telemetry) -> None:
    running = await launch(telemetry=telemetry)
    request = wire.GenerateRequest(text="hi", request_id="mine", max_tokens=9, ignore_eos=True)
    request.sampling.seed = 2**64 - 1
    await collect(running, request, metadata=parent())
    (call,) = await spans(collector, GENERATE)
    (completion,) = await spans(collector, COMPLETION)
    assert call.trace_id.hex() == completion.trace_id.hex() == TRACE
    assert (call.parent_span_id.hex(), completion.parent_span_id) == (PARENT, call.span_id)
    assert (call.kind, completion.kind) == (trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_INTERNAL)
    assert call.status.code == completion.status.code == UNSET
    port = int(running.address.rpartition(":")[2])
    seen = plain(call.attributes)
    assert seen.pop("network.peer.port") > 0
    assert seen == {
        "rpc.system.name": "grpc",
        "rpc.method": GENERATE,
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": port,
        "network.peer.address": "127.0.0.1",
    }
    seen = plain(completion.attributes)
    assert seen["gen_ai.request.seed"] == str(2**64 - 1)
    assert (seen["gen_ai.request.model"], seen["gen_ai.response.id"]) == ("scripted", "mine")
    assert (seen["gen_ai.usage.output_tokens"], seen["gen_ai.usage.cache_read.input_tokens"]) == (9, 2)
    assert (seen["gen_ai.response.finish_reasons"], seen["dspark.finish_reason"]) == (["length"], "length")
    # One token out of prefill, then three rounds: three drafted, two verified and accepted, one of the target's own.
    expected = {"rounds": 3, "drafted": 9, "verified": 6, "accepted": 6, "acceptance_by_position": [1.0, 1.0]}
    assert {name: seen[f"dspark.{name}"] for name in expected} == expected
    assert seen["dspark.mean_accepted_length"] == pytest.approx(8 / 3)
    assert (seen["dspark.verification"], seen["dspark.policy"], seen["dspark.draft_skip_share"]) == (
        "coupled",
        "auto",
        0,
    )
    first, total = (
        seen["gen_ai.response.time_to_first_chunk"],
        completion.end_time_unix_nano - call.start_time_unix_nano,
    )
    assert 0 < first < total / 1e9
    assert seen["dspark.queue_s"] + seen["dspark.prefill_s"] <= first
    assert collector.resources[0]["service.name"] == "dspark"


async def test_texts_are_recorded_only_when_opted_in(
    launch: Launch, collector: Collector, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = wire.GenerateRequest(text="my secret", stop=["naïve"])
    running = await launch("hello world, naïve café", telemetry=telemetry)
    await collect(running, secret)
    await spans(collector, COMPLETION)
    await spans(collector, GENERATE)
    everything = b"".join(span.SerializeToString() for span in collector.spans)
    assert b"secret" not in everything and b"hello" not in everything and "naïve".encode() not in everything
    collector.spans.clear()
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    running = await launch("hello world, naïve café", telemetry=from_environment("127.0.0.1", None))
    await collect(running, secret)
    (completion,) = await spans(collector, COMPLETION)
    seen = plain(completion.attributes)
    assert json.loads(seen["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "my secret"}]}
    ]
    (said,) = json.loads(seen["gen_ai.output.messages"])
    assert (said["parts"][0]["content"], said["finish_reason"]) == ("hello world, ", "stop")
    assert seen["gen_ai.request.stop_sequences"] == ["naïve"]


async def test_an_abort_is_the_clients_mistake_not_the_servers_failure(
    launch: Launch, collector: Collector, telemetry: Telemetry
) -> None:
    running = await launch(telemetry=telemetry)
    await refused(running.stub.Generate(wire.GenerateRequest()))
    (call,) = await spans(collector, GENERATE)
    assert plain(call.attributes)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert call.status.code == UNSET and "error.type" not in plain(call.attributes)


async def test_our_own_failures_are_errors(launch: Launch, collector: Collector, telemetry: Telemetry) -> None:
    failures = [RuntimeError("boom")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    running = await launch(before_step=fail_once, telemetry=telemetry)
    await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
    with pytest.raises(grpc.aio.AioRpcError):
        await running.channel.unary_unary("/dspark.v1.GenerationService/Guess")(b"")
    for name, code in ((GENERATE, "UNAVAILABLE"), (COMPLETION, "UNAVAILABLE"), ("grpc", "UNIMPLEMENTED")):
        (span,) = await spans(collector, name)
        assert span.status.code == ERROR
        assert plain(span.attributes)["error.type"] == code
        assert b"boom" not in span.SerializeToString()
    seen = plain(collector.named("grpc")[0].attributes)
    assert seen["rpc.method"] == "_OTHER"


async def test_cancelled_and_late_calls_are_told_apart(
    launch: Launch, collector: Collector, telemetry: Telemetry
) -> None:
    gate = threading.Semaphore(2)
    running = await launch(gate=gate, telemetry=telemetry, **ENDLESS)
    call = running.stub.Generate(LONG)
    await call.read()
    call.cancel()
    (span,) = await spans(collector, GENERATE)
    assert plain(span.attributes)["rpc.response.status_code"] == "CANCELLED"
    assert span.status.code == UNSET
    (completion,) = await spans(collector, COMPLETION)
    seen = plain(completion.attributes)
    assert seen["error.type"] == "CANCELLED" and "gen_ai.response.finish_reasons" not in seen
    collector.spans.clear()
    await refused(running.stub.Generate(LONG, timeout=1.5))  # long enough to get there
    for name in (GENERATE, COMPLETION):
        (span,) = await spans(collector, name)
        assert plain(span.attributes)["error.type"] == "DEADLINE_EXCEEDED"
        assert span.status.code == ERROR


@pytest.mark.parametrize(
    ("remaining", "elapsed", "status"),
    [
        (None, 5.0, "CANCELLED"),
        (5.0, 5.0, "CANCELLED"),
        (-0.1, 5.0, "DEADLINE_EXCEEDED"),
        (0.01, 0.1, "DEADLINE_EXCEEDED"),
        (1.0, 99.0, "DEADLINE_EXCEEDED"),  # gRPC made 100 s of what was 99 to the client
    ],
)
def test_a_client_that_gives_up_at_its_deadline_was_late(remaining: float | None, elapsed: float, status: str) -> None:
    assert cut_off(SimpleNamespace(time_remaining=lambda: remaining), elapsed) == status  # type: ignore[arg-type]


async def test_health_watch_and_reflection_stream_as_before(
    launch: Launch, collector: Collector, telemetry: Telemetry
) -> None:
    running = await launch(telemetry=telemetry)
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service=""))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")] * 2))
    assert len([answer async for answer in call]) == 2
    await running.server._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    (span,) = await spans(collector, "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    assert plain(span.attributes)["rpc.response.status_code"] == "OK"
    assert not collector.named("grpc.health.v1.Health/Watch")
    watch.cancel()
    (span,) = await spans(collector, "grpc.health.v1.Health/Watch")
    assert plain(span.attributes)["rpc.response.status_code"] == "CANCELLED"


async def test_services_can_be_left_out(launch: Launch, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_GRPC_EXCLUDED_SERVICES", "grpc.health.v1.Health")
    running = await launch(telemetry=from_environment("127.0.0.1", None))
    await health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest())
    await running.stub.GetModelInfo(wire.GetModelInfoRequest())
    await spans(collector, "dspark.v1.GenerationService/GetModelInfo")
    assert not collector.named("grpc.health.v1.Health/Check")


async def test_logs_name_the_trace(
    launch: Launch,
    collector: Collector,
    telemetry: Telemetry,
    log_lines: Any,  # noqa: F811
) -> None:
    running = await launch(telemetry=telemetry)
    await collect(running, wire.GenerateRequest(text="hi", request_id="traced"), metadata=parent())
    (span,) = await spans(collector, GENERATE)
    (line,) = [line for line in log_lines() if line.get("request_id") == "traced"]
    assert (line["trace_id"], line["span_id"]) == (TRACE, span.span_id.hex())


async def test_an_unsampled_call_leaves_no_span(launch: Launch, collector: Collector, telemetry: Telemetry) -> None:
    running = await launch(telemetry=telemetry)
    await collect(running, wire.GenerateRequest(text="hi"), metadata=parent("00"))
    await collect(running, wire.GenerateRequest(text="hi", request_id="other"))
    (completion,) = await spans(collector, COMPLETION)
    assert plain(completion.attributes)["gen_ai.response.id"] == "other"
    assert TRACE not in {span.trace_id.hex() for span in collector.spans}


async def test_our_client_sends_the_applications_trace(
    launch: Launch, collector: Collector, telemetry: Telemetry
) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    from clients.client import Client

    running = await launch(telemetry=telemetry)
    outer = NonRecordingSpan(SpanContext(int(TRACE, 16), int(PARENT, 16), True, TraceFlags(1)))
    async with Client(running.address) as client:
        with trace.use_span(outer):
            await client.complete("hi")
        await client.complete("hi")
    calls = await spans(collector, GENERATE, 2)
    assert [(span.trace_id.hex() == TRACE, span.parent_span_id.hex()) for span in calls] == [
        (True, PARENT),
        (False, ""),
    ]


async def test_streams_of_every_kind_pass_the_interceptor(collector: Collector, telemetry: Telemetry) -> None:
    """Handlers that yield, handlers that write, and what they raise."""

    async def yields(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        if request == b"fail":
            raise KeyError("a secret")

    async def both(requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            await context.write(request)

    async def gathers(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    server = grpc.aio.server(interceptors=telemetry.interceptors())
    handlers = {
        "Yields": grpc.unary_stream_rpc_method_handler(yields),
        "Both": grpc.stream_stream_rpc_method_handler(both),
        "Gathers": grpc.stream_unary_rpc_method_handler(gathers),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t.T", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert [m async for m in channel.unary_stream("/t.T/Yields")(b"a")] == [b"a"]
        assert [m async for m in channel.stream_stream("/t.T/Both")(iter([b"a", b"b"]))] == [b"a", b"b"]
        assert await channel.stream_unary("/t.T/Gathers")(iter([b"a", b"b"])) == b"ab"
        error, _ = await refused(channel.unary_stream("/t.T/Yields")(b"fail"))
        assert error.code() is grpc.StatusCode.UNKNOWN
    await server.stop(0)
    await spans(collector, "t.T/Both")
    await spans(collector, "t.T/Gathers")
    good, bad = await spans(collector, "t.T/Yields", 2)
    assert plain(good.attributes)["rpc.response.status_code"] == "OK"
    assert plain(bad.attributes)["error.type"] == "KeyError"
    assert bad.status.code == ERROR and b"secret" not in bad.SerializeToString()
    await telemetry.close()
