"""Metrics as a collector or Prometheus receives them, against what the clients were told."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from dspark.v1 import generation_pb2 as wire

from engine.errors import LoadError
from server.telemetry import OFF, from_environment
from tests.server.conftest import Launch, until
from tests.server.otlp import Collector, plain, points
from tests.server.test_service import collect, refused
from tests.server.test_tracing import COMPLETION, ENDLESS, LONG, parent

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("collector")  # first, so that it outlives the servers


def total(metric: Any, **attributes: Any) -> float:
    """The sum of a metric's latest points with these attributes; of a histogram, the number of values."""
    chosen = [point for point in points(metric) if attributes.items() <= plain(point.attributes).items()]
    return sum(point.count if hasattr(point, "count") else point.as_int for point in chosen)


def known(collector: Collector, *names: str) -> bool:
    return set(names) <= {metric.name for metric in collector.metrics}


async def test_metrics_agree_with_what_clients_were_told(launch: Launch, collector: Collector) -> None:
    running = await launch(telemetry=from_environment("127.0.0.1", None), **ENDLESS)
    requests = [wire.GenerateRequest(text="hi", max_tokens=count) for count in (1, 9, 30)]
    ends = [(await collect(running, request))[-1].finished for request in requests]
    await refused(running.stub.Generate(wire.GenerateRequest(token_ids=wire.TokenIds(ids=[13]))))
    rounds = sum(end.speculation.rounds for end in ends)
    await until(lambda: known(collector, "dspark.request_rounds", "dspark.draft.accepted"))
    await until(lambda: total(collector.metric("dspark.request_rounds")) == rounds)
    await until(lambda: total(collector.metric("gen_ai.server.request.duration")) == 4)
    for name in ("verified", "accepted"):
        for position in range(2):
            told = sum(
                getattr(end.speculation, f"{name}_by_position")[position] for end in ends if end.speculation.rounds
            )
            assert total(collector.metric(f"dspark.draft.{name}"), **{"dspark.position": position}) == told
    (lengths,) = points(collector.metric("dspark.accepted_length"))
    assert lengths.count == rounds
    assert total(collector.metric("dspark.request_rounds"), **{"dspark.sitting": "asked"}) == rounds
    assert total(collector.metric("dspark.rounds")) == running.engine.rounds
    for stage in ("draft", "verify", "absorb", "decide"):
        metric = collector.metric("dspark.round.stage.duration")
        assert total(metric, **{"dspark.stage": stage}) == running.engine.rounds
    (error,) = points(collector.metric("dspark.cost_table.error"))
    assert error.sum / error.count == pytest.approx(abs(0.012 - 0.016) / 0.016)
    (calibration,) = points(collector.metric("dspark.calibration.error"))
    assert calibration.as_double == pytest.approx(0.5)  # 0.5 was predicted, all was accepted
    assert total(collector.metric("gen_ai.server.time_to_first_token")) == 3
    assert total(collector.metric("gen_ai.server.time_per_output_token")) == 2  # one had a single token
    usage = {plain(point.attributes)["gen_ai.token.type"]: point for point in points(collector.metric(TOKEN_USAGE))}
    assert (usage["output"].sum, usage["input"].sum) == (40, sum(end.usage.prompt_tokens for end in ends))
    assert total(collector.metric("dspark.prefix_cache.hit.tokens")) == sum(end.usage.cached_tokens for end in ends)
    assert total(collector.metric("gen_ai.server.request.duration"), **{"error.type": "INVALID_ARGUMENT"}) == 1
    code = {"rpc.response.status_code": "INVALID_ARGUMENT"}
    await until(lambda: total(collector.metric("rpc.server.call.duration"), **code) == 1)


TOKEN_USAGE = "gen_ai.client.token.usage"
STANDARD = {  # the semantic conventions' advice
    "rpc.server.call.duration": [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10],
    "gen_ai.server.request.duration": [
        *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
    ],
    "gen_ai.server.time_to_first_token": [
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
    ],
    "gen_ai.server.time_per_output_token": [
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
    ],
    TOKEN_USAGE: [
        *(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
    ],
}  # fmt: skip


async def test_standard_buckets_and_exemplars(
    launch: Launch, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.telemetry.rounds.EVERY_S", 3600.0)
    running = await launch(telemetry=from_environment("127.0.0.1", None))
    await collect(running, wire.GenerateRequest(text="hi"), metadata=parent())
    await until(lambda: known(collector, *STANDARD, "dspark.round.duration"))
    await until(lambda: bool(collector.named(COMPLETION) and collector.named("dspark.round")))
    for name, bounds in STANDARD.items():
        point = next(iter(points(collector.metric(name))))
        assert list(point.explicit_bounds) == pytest.approx(bounds), name
    (completion,) = collector.named(COMPLETION)
    (round_,) = collector.named("dspark.round")

    def shown(name: str) -> list[Any]:
        measured = [point for metric in collector.metrics if metric.name == name for point in points(metric)]
        return [exemplar for point in measured for exemplar in point.exemplars]

    for name in STANDARD:
        if name.startswith("gen_ai.server."):
            await until(lambda name=name: bool(shown(name)))  # type: ignore[misc]
            seen = {(exemplar.trace_id, exemplar.span_id) for exemplar in shown(name)}
            assert seen == {(completion.trace_id, completion.span_id)}
    await until(lambda: bool(shown("dspark.round.duration")))
    (exemplar,) = shown("dspark.round.duration")
    assert (exemplar.trace_id, exemplar.span_id) == (round_.trace_id, round_.span_id)
    assert exemplar.as_double == plain(round_.attributes)["dspark.measured_s"]


async def test_gauges_fall_back_when_a_request_is_gone(
    launch: Launch, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.telemetry.live.TOTALS_S", 0.0)
    gate = threading.Semaphore(3)
    running = await launch(gate=gate, telemetry=from_environment("127.0.0.1", None), **ENDLESS)

    def gauge(name: str, state: str) -> float:
        return total(collector.metric(name), **{"dspark.state": state}) if known(collector, name) else -1

    call = running.stub.Generate(LONG)
    await call.read()
    await until(lambda: gauge("dspark.requests", "running") == 1 and gauge("dspark.pages", "used") == 1)
    call.cancel()
    await until(lambda: not running.server.service.active)
    gate.release(1)
    await until(lambda: gauge("dspark.requests", "running") == 0 and gauge("dspark.pages", "free") == 64)


async def test_deltas_add_up(launch: Launch, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta")
    running = await launch(telemetry=from_environment("127.0.0.1", None))

    def added(name: str) -> float:
        return sum(total(metric) for metric in collector.metrics if metric.name == name)

    for _ in range(3):
        await collect(running, wire.GenerateRequest(text="hi"))
        seen = running.engine.rounds
        await until(lambda seen=seen: added("dspark.round.duration") == added("dspark.rounds") == seen)  # type: ignore[misc]


async def test_a_new_engine_is_watched_too(launch: Launch, collector: Collector) -> None:
    failures = [RuntimeError("boom")] * 3

    def fail_at_first() -> None:
        if failures:
            raise failures.pop()

    running = await launch(before_step=fail_at_first, telemetry=from_environment("127.0.0.1", None))
    while failures:
        await refused(running.stub.Generate(wire.GenerateRequest(text="hi")))
    await until(lambda: running.server._worker.ready)
    await collect(running, wire.GenerateRequest(text="hi"))
    await until(lambda: known(collector, "dspark.rounds"))


async def test_the_prometheus_endpoint(launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    caplog.set_level("INFO", "dspark.server")
    running = await launch(telemetry=from_environment("127.0.0.1", 0))
    (url,) = [record.fields["url"] for record in caplog.records if record.getMessage() == "metrics"]
    await collect(running, wire.GenerateRequest(text="hi"))

    def scrape() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    await until(lambda: f'dspark_rounds_total{{dspark_stop="rule"}} {running.engine.rounds:.1f}' in scrape())
    page = scrape()
    assert f"dspark_round_duration_seconds_count {running.engine.rounds:.1f}" in page
    assert 'gen_ai_server_request_duration_seconds_bucket{gen_ai_operation_name="text_completion"' in page
    with pytest.raises(LoadError, match="choose another port"):
        from_environment("127.0.0.1", int(url.rpartition(":")[2].partition("/")[0]))


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_METRICS_EXPORTER": "csv"}, "OTEL_METRICS_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "some"}, "OTEL_TRACES_SAMPLER_ARG"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "long"}, "OTEL_EXPORTER_OTLP"),
    ],
)
async def test_wrong_variables_are_named(
    variables: dict[str, str], names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoadError, match=names):
        from_environment("127.0.0.1", None)


async def test_off_unless_something_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert from_environment("127.0.0.1", None) is OFF
    with pytest.raises(LoadError, match="OTEL_SDK_DISABLED"):
        from_environment("127.0.0.1", 0)
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    assert from_environment("127.0.0.1", None) is OFF
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert from_environment("127.0.0.1", None) is OFF
    assert not OFF.interceptors()


def test_a_server_without_telemetry_does_not_import_it() -> None:
    check = "import server.app, clients.client, sys; sys.exit('opentelemetry' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "proto"})


@pytest.mark.parametrize("trouble", ["down", "silent"])
async def test_a_collector_in_trouble_troubles_nobody_else(
    launch: Launch, collector: Collector, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    if trouble == "down":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    else:
        collector.hold = asyncio.Event()
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")  # seconds for which it would be tried again
    monkeypatch.setattr("server.telemetry.live.CLOSING_S", 0.5)
    telemetry = from_environment("127.0.0.1", None)
    running = await launch(telemetry=telemetry)
    for _ in range(30):  # three spans each, and 16 are kept
        assert (await collect(running, wire.GenerateRequest(text="hi")))[-1].HasField("finished")
    async with asyncio.timeout(60):
        await telemetry.close()
