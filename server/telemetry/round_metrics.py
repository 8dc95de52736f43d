"""Rounds as metrics. A round may take a millisecond, of which one measurement by the SDK would take a good part.

So the engine's side adds rounds up, and the sums join what the SDK collected on its way to a reader. Exemplars come
from the rounds that got a span.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from engine.messages import EngineStats
from engine.schedule.record import RoundRecord
from server.boundary import Totals
from server.round_totals import CALIBRATION_BINS, Distribution, RoundTotals, expected_calibration_error

SCOPE = "dspark"
CALIBRATION_WINDOW = 20_000  # verified positions that the calibration error looks back on, about
Attributes = Mapping[str, str | int]
_NONE: Attributes = {}

HISTOGRAMS = {  # unit, description
    "dspark.round.duration": ("s", "Time of a round"),
    "dspark.round.stage.duration": ("s", "Time of one stage of a round"),
    "dspark.round.verify_budget": ("{token}", "Draft tokens verified in a round, of all requests"),
    "dspark.accepted_length": ("{token}", "Tokens that a decode round gave a request, the target's own included"),
    "dspark.cost_table.error": ("1", "|predicted − measured| ÷ measured time of a round"),
}
COUNTERS = {
    "dspark.rounds": ("{round}", "Rounds, by why they verified no more"),
    "dspark.request_rounds": ("{round}", "Decode rounds of requests, by why they drafted or did not"),
    "dspark.draft.verified": ("{token}", "Draft tokens verified, by position in the draft"),
    "dspark.draft.reached": ("{token}", "Of these, with all before them accepted"),
    "dspark.draft.accepted": ("{token}", "Of these, accepted"),
}


def _distributions(totals: RoundTotals) -> Iterator[tuple[str, Attributes, Distribution]]:
    yield "dspark.round.duration", _NONE, totals.duration
    for stage, times in totals.stages.items():
        yield "dspark.round.stage.duration", {"dspark.stage": stage}, times
    yield "dspark.round.verify_budget", _NONE, totals.verify_budget
    yield "dspark.accepted_length", _NONE, totals.accepted_length
    yield "dspark.cost_table.error", _NONE, totals.cost_error


def _counts(totals: RoundTotals) -> Iterator[tuple[str, Attributes, int]]:
    for stop, count in totals.stops.items():
        yield "dspark.rounds", {"dspark.stop": stop}, count
    for sitting, count in totals.sittings.items():
        yield "dspark.request_rounds", {"dspark.sitting": sitting}, count
    by_position = {"verified": totals.verified, "reached": totals.reached, "accepted": totals.accepted}
    for name, counts in by_position.items():
        for position, count in enumerate(counts):
            yield f"dspark.draft.{name}", {"dspark.position": position}, count


Series = tuple[str, tuple[tuple[str, str | int], ...]]


@dataclass(slots=True)
class ReaderSums:
    """What one reader has yet to read (delta), or all there ever was (cumulative)."""

    delta: bool
    since_ns: int = field(default_factory=time.time_ns)
    totals: RoundTotals = field(default_factory=RoundTotals)
    exemplars: dict[Series, dict[int, Exemplar]] = field(default_factory=dict)  # by bucket, the last one not yet read


class RoundMetrics:
    """Sums of rounds for every reader, each in a thread of its own, and the gauges that the same messages bring."""

    def __init__(self, meter: Meter) -> None:
        self._lock = threading.Lock()
        self._readers: list[ReaderSums] = []
        self._bins: list[list[float]] = [[0, 0.0, 0] for _ in range(CALIBRATION_BINS)]
        self._stats: EngineStats | None = None
        gauge = meter.create_observable_gauge
        gauge("dspark.requests", [self._requests], "{request}", "Requests in the engine, by state")
        gauge("dspark.pages", [self._pages], "{page}", "Pages of the caches, by state")
        gauge("dspark.calibration.error", [self._calibration], "1", "Expected calibration error of the confidences")

    def reader(self, *, delta: bool) -> ReaderSums:
        """A place for one more reader."""
        sums = ReaderSums(delta)
        self._readers.append(sums)
        return sums

    def take(self, message: Totals) -> None:
        """More rounds."""
        with self._lock:
            self._stats = message.stats
            for sums in self._readers:
                sums.totals.merge(message.rounds)
            for bin_, added in zip(self._bins, message.rounds.calibration, strict=True):
                bin_[:] = [old + new for old, new in zip(bin_, added, strict=True)]
            if sum(count for count, _, _ in self._bins) > CALIBRATION_WINDOW:
                self._bins = [[value / 2 for value in bin_] for bin_ in self._bins]

    def exemplify(self, record: RoundRecord, span: SpanContext) -> None:
        """Makes a round that has a span the example of the buckets that it fell into."""
        alone = RoundTotals()
        alone.add(record)
        now = time.time_ns()
        with self._lock:
            for name, attributes, values in _distributions(alone):
                if values.count:
                    value = values.high
                    exemplar = Exemplar({}, value, now, span.span_id, span.trace_id)
                    for sums in self._readers:
                        series = (name, tuple(attributes.items()))
                        sums.exemplars.setdefault(series, {})[values.bucket(value)] = exemplar

    def join(self, collected: MetricsData, sums: ReaderSums) -> MetricsData:
        """What a reader reads: what the SDK collected, and the rounds."""
        with self._lock:
            metrics = list(_metrics(sums))
            if sums.delta:
                sums.totals.clear()
                sums.since_ns = time.time_ns()
        if not metrics or not collected.resource_metrics:
            return collected
        first, *rest = collected.resource_metrics
        scope = ScopeMetrics(InstrumentationScope(f"{SCOPE}.rounds"), metrics, "")
        return MetricsData([replace(first, scope_metrics=[*first.scope_metrics, scope]), *rest])

    def _requests(self, options: CallbackOptions) -> Iterator[Observation]:
        if (stats := self._stats) is not None:
            yield Observation(stats.running, {"dspark.state": "running"})
            yield Observation(stats.waiting, {"dspark.state": "waiting"})

    def _pages(self, options: CallbackOptions) -> Iterator[Observation]:
        if (stats := self._stats) is not None:
            used = stats.pages_total - stats.pages_free - stats.pages_cached
            for state, count in (("used", used), ("cached", stats.pages_cached), ("free", stats.pages_free)):
                yield Observation(count, {"dspark.state": state})

    def _calibration(self, options: CallbackOptions) -> Iterator[Observation]:
        with self._lock:
            if any(count for count, _, _ in self._bins):
                yield Observation(expected_calibration_error(self._bins))


def _metrics(sums: ReaderSums) -> Iterator[Metric]:
    now = time.time_ns()
    temporality = AggregationTemporality.DELTA if sums.delta else AggregationTemporality.CUMULATIVE
    histograms: dict[str, list[HistogramDataPoint]] = {}
    for name, attributes, values in _distributions(sums.totals):
        if values.count:
            exemplars = sums.exemplars.pop((name, tuple(attributes.items())), {})
            point: dict[str, Any] = {
                "attributes": attributes,
                "start_time_unix_nano": sums.since_ns,
                "time_unix_nano": now,
                "count": values.count,
                "sum": values.total,
                "bucket_counts": tuple(values.counts),
                "explicit_bounds": values.bounds,
                "min": values.low,
                "max": values.high,
                "exemplars": list(exemplars.values()),
            }
            histograms.setdefault(name, []).append(HistogramDataPoint(**point))
    for name, histogram in histograms.items():
        unit, description = HISTOGRAMS[name]
        yield Metric(name, description, unit, Histogram(histogram, temporality))
    counters: dict[str, list[NumberDataPoint]] = {}
    for name, attributes, count in _counts(sums.totals):
        counters.setdefault(name, []).append(NumberDataPoint(attributes, sums.since_ns, now, count))
    for name, numbers in counters.items():
        unit, description = COUNTERS[name]
        yield Metric(name, description, unit, Sum(numbers, temporality, is_monotonic=True))
