"""Traces and metrics of a real server through a real collector."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from clients.client import Client, ServerError
from clients.events import Options
from tests.e2e.conftest import start
from tests.e2e.rotel_agent import rotel_agent
from tests.server.conftest import until
from tests.server.otlp import Collector, collecting, plain, points

TRACE = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = 0xB7AD6B7169203331
OUTER = NonRecordingSpan(SpanContext(TRACE, PARENT, True, TraceFlags(1)))


def lines(path: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line.get("event") == event]


async def test_a_request_explains_its_speed_through_a_real_collector(tmp_path: Path) -> None:
    async with collecting() as collector:
        with rotel_agent(tmp_path, "--otlp-exporter-endpoint", collector.endpoint) as endpoint:
            process = await asyncio.to_thread(
                start,
                ["--policy", "fixed", "--metrics-port", "0", "--cost-cache", ""],
                tmp_path / "log",
                OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
                OTEL_BSP_SCHEDULE_DELAY="50",
                OTEL_METRIC_EXPORT_INTERVAL="200",
                OTEL_SERVICE_NAME="under-test",
            )
            async with Client(process.address) as client:
                with trace.use_span(OUTER):
                    completion = await client.complete(
                        "import os\n", Options(max_tokens=200, temperature=0, ignore_eos=True), request_id="one"
                    )
                with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
                    await client.complete("import", Options(max_tokens=3000, ignore_eos=True), timeout_s=0.3)
            await until(lambda: len([span for span in collector.spans if " " in span.name]) == 2)
            await until(lambda: "dspark.request_rounds" in {metric.name for metric in collector.metrics})
            await until(lambda: bool(collector.named("dspark.round")))
            page = await asyncio.to_thread(scrape, lines(tmp_path / "log", "metrics")[0]["url"])
            assert await asyncio.to_thread(process.stop) == 0
    check_spans(collector, completion.finished.speculation)
    rounds = collector.metric("dspark.request_rounds")
    assert sum(point.as_int for point in points(rounds)) > completion.finished.speculation.rounds
    assert "dspark_accepted_length_count" in page and "gen_ai_server_time_to_first_token_seconds_bucket" in page
    assert {resource["service.name"] for resource in collector.resources} == {"under-test"}
    done, late = lines(tmp_path / "log", "request")
    assert (done["trace_id"], late["status"]) == (f"{TRACE:032x}", "DEADLINE_EXCEEDED")
    assert late["trace_id"] != done["trace_id"]


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def check_spans(collector: Collector, told: Any) -> None:
    """The request's span says what the client was told; rounds lead to it."""
    (done,) = [
        span for span in collector.spans if plain(span.attributes).get("gen_ai.response.id", "").startswith("one")
    ]
    seen = plain(done.attributes)
    assert done.trace_id.hex() == f"{TRACE:032x}"
    assert (seen["dspark.rounds"], seen["dspark.accepted"]) == (told.rounds, told.accepted)
    assert seen["dspark.mean_accepted_length"] == pytest.approx(told.mean_accepted_length)
    assert seen["dspark.policy"] == "fixed"
    (call,) = [span for span in collector.spans if span.span_id == done.parent_span_id]
    assert call.parent_span_id.hex() == f"{PARENT:016x}"
    linked = [span for span in collector.named("dspark.round") if done.span_id in {link.span_id for link in span.links}]
    assert linked
    for span in linked:
        assert (
            done.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= done.end_time_unix_nano
        )
        assert plain(span.attributes)["dspark.measured_s"] > 0
