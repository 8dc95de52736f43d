"""Spans of rounds: whom they are linked to, how many there are, and a request's own rounds."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from server.telemetry import Telemetry
from tests.server.conftest import Launch, Running, until
from tests.server.otlp import Collector, plain
from tests.server.test_tracing import COMPLETION, spans
from tests.server.test_trouble import ENDLESS, LONG

pytestmark = pytest.mark.usefixtures("collector")


async def run_together(running: Running, count: int, **options: Any) -> None:
    """Requests that are in the engine at the same time."""
    calls = [running.stub.Generate(LONG, **options) for _ in range(count)]
    await until(lambda: len(running.server.service.active) == count)
    assert running.engine.gate is not None
    running.engine.gate.release(10_000)
    await asyncio.gather(*(drain(call) for call in calls))


async def drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_rounds_are_linked_to_the_requests_they_served(
    launch: Launch, collector: Collector, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.telemetry.rounds.EVERY_S", 0.0)
    running = await launch(gate=threading.Semaphore(0), telemetry=telemetry, **ENDLESS)
    await run_together(running, 3)
    completions = await spans(collector, COMPLETION, 3)
    rounds = collector.named("dspark.round")
    known = {(span.trace_id, span.span_id) for span in completions}
    assert {(link.trace_id, link.span_id) for span in rounds for link in span.links} == known
    assert len(rounds) == running.engine.rounds
    assert not any(span.parent_span_id for span in rounds)
    for span in rounds:
        seen = plain(span.attributes)
        assert (seen["dspark.predicted_s"], seen["dspark.measured_s"], seen["dspark.stop"]) == (0.012, 0.016, "rule")
        sittings = [plain(link.attributes).get("dspark.sitting", "prefill") for link in span.links]
        assert set(sittings) <= {"asked", "prefill"}
        assert sittings.count("asked") * 3 == seen["dspark.candidates"]
        assert span.start_time_unix_nano <= span.end_time_unix_nano


async def test_few_rounds_get_a_span(
    launch: Launch, collector: Collector, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.telemetry.rounds.EVERY_S", 3600.0)
    running = await launch(telemetry=telemetry, **ENDLESS)
    await drain(running.stub.Generate(LONG))
    await drain(running.stub.Generate(LONG, metadata=(("x-dspark-trace-rounds", "7"),)))
    await spans(collector, COMPLETION, 2)
    assert running.engine.rounds > 300 and len(collector.named("dspark.round")) == 1


async def test_a_request_sees_its_own_rounds_when_it_asks(
    launch: Launch, collector: Collector, telemetry: Telemetry
) -> None:
    running = await launch(gate=threading.Semaphore(0), telemetry=telemetry, **ENDLESS)
    await run_together(running, 2, metadata=(("x-dspark-trace-rounds", "1000000"),))
    for asked in ("7", "all"):
        await drain(running.stub.Generate(LONG, metadata=(("x-dspark-trace-rounds", asked),)))
    completions = await spans(collector, COMPLETION, 4)
    assert [len(span.events) for span in completions] == [100, 100, 7, 0]
    seen = plain(completions[0].events[3].attributes)
    assert (seen["dspark.sitting"], seen["dspark.verified"], seen["dspark.survival"]) == ("asked", 2, [0.5] * 3)
