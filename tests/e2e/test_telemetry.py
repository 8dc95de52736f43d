"""Traces and metrics of a real server through a real collector."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from clients.client import Client
from clients.events import Delta, Options
from tests.e2e.conftest import Process, start
from tests.e2e.rotel_agent import rotel_agent
from tests.server.conftest import until
from tests.server.otlp import Collector, collecting, plain, points

TRACE = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = 0xB7AD6B7169203331
WAIT_S = 240.0  # generous: nothing here is about time
OUTER = NonRecordingSpan(SpanContext(TRACE, PARENT, True, TraceFlags(1)))


def lines(path: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line.get("event") == event]


@contextmanager
def serving(log: Path, endpoint: str) -> Iterator[Process]:
    arguments = ["--policy", "fixed", "--metrics-port", "0", "--cost-cache", ""]
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "OTEL_SERVICE_NAME": "under-test",
    }
    process = start(arguments, log, **variables)
    try:
        yield process
        assert process.stop() == 0
    finally:
        process.popen.kill()
        process.popen.wait()


@asynccontextmanager
async def in_threads() -> AsyncIterator[Callable[[AbstractContextManager[Any]], Awaitable[Any]]]:
    """Enters and leaves what blocks, while the collector here goes on."""
    stack = ExitStack()
    try:
        yield lambda manager: asyncio.to_thread(stack.enter_context, manager)
    finally:
        await asyncio.to_thread(stack.close)


@pytest.mark.timeout(900)  # a machine that is busy with other things
async def test_a_request_explains_its_speed_through_a_real_collector(tmp_path: Path) -> None:
    async with collecting() as collector, in_threads() as enter:
        endpoint = await enter(rotel_agent(tmp_path, "--otlp-exporter-endpoint", collector.endpoint))
        process = await enter(serving(tmp_path / "log", endpoint))
        told = await use(process.address)

        def counted() -> int:
            found = [metric for metric in collector.metrics if metric.name == "dspark.request_rounds"]
            return sum(point.as_int for point in points(found[-1])) if found else 0

        def finished() -> int:
            return sum(span.name.startswith("text_completion ") for span in collector.spans)

        await until(lambda: finished() == 2 and bool(collector.named("dspark.round")), WAIT_S)
        await until(lambda: counted() > told.rounds, WAIT_S)
        page = await asyncio.to_thread(scrape, lines(tmp_path / "log", "metrics")[0]["url"])
    check_spans(collector, told)
    assert "dspark_accepted_length_count" in page and "gen_ai_server_time_to_first_token_seconds_bucket" in page
    assert {resource["service.name"] for resource in collector.resources} == {"under-test"}
    done, left = lines(tmp_path / "log", "request")
    assert (done["trace_id"], left["status"]) == (f"{TRACE:032x}", "CANCELLED")
    assert left["trace_id"] != done["trace_id"]


async def use(address: str) -> Any:
    """One generation to its end, and one that is left soon. Returns what the first one was told of speculation."""
    async with Client(address) as client:
        with trace.use_span(OUTER):
            options = Options(max_tokens=200, temperature=0, ignore_eos=True)
            completion = await client.complete("import os\n", options, request_id="one")
        left = client.generate("import", Options(max_tokens=3500, ignore_eos=True))
        async for event in left:
            if isinstance(event, Delta):
                break
        await left.aclose()
    return completion.finished.speculation


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
