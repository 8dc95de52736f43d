"""Spans of the engine's rounds, linked to the requests that they served, and a request's rounds where it asked.

Only rounds that served a sampled request are looked at, and only a few a second: a small model runs a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from engine.schedule.record import RequestRecord, RoundRecord
from server.round_samples import SampleFeed, SeenRound
from server.telemetry.times import epoch_ns

ROUND = "dspark.round"
EVERY_S = 0.2  # between two rounds with a span
ROUNDS_KEY = "x-dspark-trace-rounds"  # metadata: how many of its rounds a request wants to see
MAX_ROUNDS = 100  # a span keeps 128 events


class RoundSampler(Sampler):
    """Keeps every span of a round, which exists only for sampled requests' sake; leaves the rest to another sampler."""

    def __init__(self, others: Sampler) -> None:
        self._others = others

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if name == ROUND:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._others.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"RoundSampler{{{self._others.get_description()}}}"


@dataclass(slots=True, eq=False)
class Served:
    """A sampled request."""

    span: Span
    rounds_left: int  # to show on its own span
    key: str = ""  # the engine's name for it, once it has one


class RoundSpans:
    """Turns records of rounds into spans and events.

    Args:
        on_span: told of each round that got a span.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        feed: SampleFeed,
        on_span: Callable[[RoundRecord, SpanContext], None] = lambda record, span: None,
    ) -> None:
        self._tracer = tracer
        self._feed = feed
        self._on_span = on_span
        self._served: set[Served] = set()
        self._interval_s: float | None = None
        self._end: Callable[[], None] = lambda: None
        self._last = float("-inf")  # when the last round with a span began

    def serve(self, span: Span, rounds: int = 0) -> Served:
        """A sampled request is about to go to the engine; `rounds` of its rounds are to be shown on its span."""
        served = Served(span, rounds)
        self._served.add(served)
        self._subscribe()  # before the request is sent, so that its first round is heard of
        return served

    def leave(self, served: Served) -> None:
        """It has ended."""
        self._served.remove(served)
        self._subscribe()

    def _subscribe(self) -> None:
        interval_s = EVERY_S if self._served else None
        if any(served.rounds_left for served in self._served):
            interval_s = 0.0
        if interval_s == self._interval_s:
            return
        former, self._interval_s = self._end, interval_s
        self._end = (lambda: None) if interval_s is None else self._feed.records(self._see, interval_s)
        former()

    def _see(self, seen: SeenRound) -> None:
        decisions = {request.request_id: request for request in seen.record.requests}
        links = []
        for served in self._served:
            if served.key not in seen.served:
                continue
            decision = decisions.get(served.key)
            links.append(Link(served.span.get_span_context(), _decision(decision) if decision is not None else None))
            if served.rounds_left and decision is not None:
                self._show(served, decision, seen)
        self._subscribe()
        # Somebody else may want to hear of every round.
        if links and seen.began - self._last >= EVERY_S:
            self._last = seen.began
            start, end = epoch_ns(seen.began), epoch_ns(seen.ended)
            span = self._tracer.start_span(
                ROUND, Context(), SpanKind.INTERNAL, _attributes(seen.record), links, start_time=start
            )
            self._on_span(seen.record, span.get_span_context())
            span.end(end)

    def _show(self, served: Served, decision: RequestRecord, seen: SeenRound) -> None:
        served.rounds_left -= 1
        shown = {
            "dspark.round": seen.record.round,
            "dspark.measured_s": seen.record.measured_s,
            "dspark.weight": decision.weight,
            "dspark.context": decision.context,
            "dspark.survival": decision.survival,
            **_decision(decision),
        }
        served.span.add_event(ROUND, shown, epoch_ns(seen.ended))


def rounds_asked(context: grpc.aio.ServicerContext[Any, Any]) -> int:
    """How many of its rounds a call wants to see; 0 for what is no number."""
    for key, value in context.invocation_metadata() or ():
        if key == ROUNDS_KEY and isinstance(value, str) and value.isdecimal():
            return min(int(value[:9]), MAX_ROUNDS)
    return 0


def _decision(request: RequestRecord) -> dict[str, str | int]:
    return {
        "dspark.sitting": request.sitting.name.lower(),
        "dspark.drafted": request.drafted,
        "dspark.verified": request.verified,
        "dspark.accepted": request.accepted,
    }


def _attributes(record: RoundRecord) -> dict[str, Any]:
    return {
        "dspark.round": record.round,
        "dspark.policy": record.policy,
        "dspark.running": record.running,
        "dspark.waiting": record.waiting,
        "dspark.prefill_rows": record.prefill_rows,
        "dspark.candidates": record.candidates,
        "dspark.verify_budget": record.verified,
        "dspark.predicted_accepts": record.predicted_accepts,
        "dspark.accepted": record.accepted,
        "dspark.tokens": record.tokens,
        "dspark.predicted_s": record.predicted_s,
        "dspark.measured_s": record.measured_s,
        "dspark.draft_s": record.draft_s,
        "dspark.verify_s": record.verify_s,
        "dspark.absorb_s": record.absorb_s,
        "dspark.decide_s": record.decide_s,
        "dspark.price": record.price,
        "dspark.stop": record.stop.name.lower(),
    }
