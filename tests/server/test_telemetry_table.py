"""The README's table of spans, attributes and metrics says what is really emitted, neither more nor less."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire

from server.telemetry import from_environment
from tests.server.conftest import Launch, until
from tests.server.otlp import Collector, plain, points
from tests.server.test_service import collect, refused

README = Path(__file__).resolve().parents[2] / "README.md"
ROW = re.compile(r"^\| (span|event|attribute|metric|resource) \| (.*?) \| (.*?) \| (.*?) \| .* \|$", re.MULTILINE)
Entry = tuple[str, str, str, frozenset[str]]  # what, name, unit, on which


@pytest.fixture(autouse=True)
def everything(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and every round are to be seen."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    monkeypatch.setattr("server.telemetry.rounds.EVERY_S", 0.0)


def table() -> set[Entry]:
    """The README's rows; one may hold several names."""
    return {
        (what, name, unit.strip("`"), frozenset(on.split(", ")) - {"–"})
        for what, names, unit, on in ROW.findall(README.read_text(encoding="utf-8"))
        for name in re.findall(r"`(.+?)`", names)
    }


async def exercise(running: Any) -> None:
    """Everything that leaves a trace of its own kind."""
    request = wire.GenerateRequest(text="hi", max_tokens=20, stop=["never said"], ignore_eos=True)
    request.sampling.seed = 5
    await collect(running, request, metadata=(("x-dspark-trace-rounds", "3"),))
    await refused(running.stub.Generate(wire.GenerateRequest(token_ids=wire.TokenIds(ids=[13]))))
    with pytest.raises(grpc.aio.AioRpcError):
        await running.channel.unary_unary("/dspark.v1.GenerationService/Guess")(b"")


def emitted(collector: Collector) -> tuple[set[Entry], dict[str, list[Any]]]:
    """What has come, and each attribute's values."""
    on: dict[str, set[str]] = {}
    values: dict[str, list[Any]] = {}
    found: set[Entry] = set()

    def note(where: str, attributes: Any) -> None:
        for name, value in plain(attributes).items():
            on.setdefault(name, set()).add(where)
            values.setdefault(name, []).append(value)

    for span in collector.spans:
        where, name = kind_of(span.name)
        found.add(("span", name, "s", frozenset()))
        note(where, span.attributes)
        for link in span.links:
            note("link", link.attributes)
        for event in span.events:
            found.add(("event", event.name, "–", frozenset()))
            note("event", event.attributes)
    for metric in collector.metrics:
        found.add(("metric", metric.name, metric.unit, frozenset()))
        for point in points(metric):
            note("metric", point.attributes)
    found |= {("attribute", name, unit_of(name), frozenset(wheres)) for name, wheres in on.items()}
    for resource in collector.resources:
        names = {name for name in resource if not name.startswith("telemetry.sdk.")}
        found |= {("resource", name, "–", frozenset()) for name in names}
    return found, values


def kind_of(name: str) -> tuple[str, str]:
    if name.startswith("text_completion "):
        return "completion", "text_completion {model}"
    if name == "dspark.round":
        return "round", name
    return "call", "{service}/{method}" if "/" in name else name


def unit_of(name: str) -> str:
    """As the table has it: what is not on the wire cannot be compared."""
    return next((unit for what, known, unit, _ in table() if (what, known) == ("attribute", name)), "?")


async def test_the_table_is_true(launch: Launch, collector: Collector) -> None:
    telemetry = from_environment("127.0.0.1", None)
    running = await launch(telemetry=telemetry, eos=False)
    await exercise(running)
    documented = table()
    metrics = {name for what, name, _, _ in documented if what == "metric"}
    with contextlib.suppress(TimeoutError):  # what is missing is named below
        await until(lambda: metrics <= {metric.name for metric in collector.metrics})
    await telemetry.close()
    found, values = emitted(collector)
    assert sorted(found - documented, key=str) == [], "emitted, but not in the table"
    assert sorted(documented - found, key=str) == [], "in the table, but not emitted"
    for what, name, unit, _ in documented:
        if what == "attribute":
            texts = any(isinstance(value, str) for value in values[name])
            seconds = all(isinstance(value, float) for value in values[name])
            assert texts <= (unit == "–"), f"{name} is {values[name][0]!r}, with unit {unit!r}"
            assert name.endswith("_s") <= (unit == "s") <= seconds, name
