"""Sums of rounds: counted right, and read with their exemplars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, Sum
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanContext

from engine.schedule.record import RequestRecord, Sitting
from server.accounting import SpeculationCounts
from server.boundary import Totals
from server.round_totals import RoundTotals, expected_calibration_error
from server.telemetry.round_metrics import RoundMetrics
from tests.server.fake_engine import ScriptedEngine, record_of


def test_an_exemplar_waits_for_the_sums_of_its_round() -> None:
    rounds = RoundMetrics(NoOpMeterProvider().get_meter("test"))
    reader, record, totals = rounds.reader(delta=False), record_of(1, []), RoundTotals()

    def read() -> list[int]:
        joined = rounds.join(MetricsData([ResourceMetrics(Resource({}), [], "")]), reader)
        parts = [metric for part in joined.resource_metrics[0].scope_metrics for metric in part.metrics]
        (durations,) = [metric.data for metric in parts if metric.name == "dspark.round.duration"] or [Sum([], 0, True)]
        return [exemplar.span_id for point in durations.data_points for exemplar in point.exemplars]

    rounds.exemplify(record, SpanContext(1, 2, is_remote=False))
    assert read() == []
    totals.add(record)
    rounds.take(Totals(totals, ScriptedEngine([1]).stats()))
    assert read() == [2]
    assert read() == [], "shown once"


def requests(outcomes: Iterable[tuple[int, int, tuple[float, ...]]]) -> tuple[RequestRecord, ...]:
    return tuple(
        RequestRecord(str(n), Sitting.DRAFTS, 1.0, 9, len(survival), verified, accepted, survival)
        for n, (verified, accepted, survival) in enumerate(outcomes)
    )


def test_sums_of_rounds_against_plain_counting() -> None:
    generator = np.random.default_rng(3)
    counts, halves = SpeculationCounts(), [RoundTotals(), RoundTotals()]
    predicted: list[float] = []
    kept: list[bool] = []
    for number in range(400):
        outcomes = []
        for _ in range(int(generator.integers(0, 4))):
            verified = int(generator.integers(0, 6))
            accepted = int(generator.integers(0, verified + 1))
            survival = tuple(np.sort(generator.random(7))[::-1].tolist())
            outcomes.append((verified, accepted, survival))
            counts.add(committed=accepted + 1, drafted=7, verified=verified, accepted=accepted)
            predicted += survival[:verified]
            kept += [position < accepted for position in range(verified)]
        record = record_of(number, [])
        halves[number % 2].add(type(record)(**{**_fields(record), "requests": requests(outcomes)}))
    totals = halves[0]
    totals.merge(halves[1])
    assert (totals.verified, totals.reached, totals.accepted) == (
        counts.verified_by_position,
        counts.reached_by_position,
        counts.accepted_by_position,
    )
    assert (totals.accepted_length.count, totals.accepted_length.total) == (counts.rounds, counts.committed)
    bins = np.minimum((np.array(predicted) * 10).astype(int), 9)
    gaps = [abs((np.array(predicted) - np.array(kept))[bins == bin_].sum()) for bin_ in range(10)]
    assert expected_calibration_error(totals.calibration) == pytest.approx(sum(gaps) / len(kept))


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record._fields}
