"""Sums over many rounds' records: what a metric needs of each round, at a few microseconds a round.

The engine's process adds rounds up and sends the sums about once a second; the server adds those up again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from engine.schedule.record import RoundRecord, Sitting, Stop

STAGES = ("draft", "verify", "absorb", "decide")
CALIBRATION_BINS = 10  # of equal width in predicted acceptance
# Made once: an enum's own name is a property, and lower() makes a new text each time.
_STOPS = {stop: stop.name.lower() for stop in Stop}
_SITTINGS = {sitting: sitting.name.lower() for sitting in Sitting}

SECONDS = tuple(1e-4 * 2**step for step in range(15))  # 0.1 ms to 1.6 s
TOKENS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0)
LENGTHS = tuple(float(length) for length in range(1, 17))
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0)


class Distribution:
    """A histogram: values at most `bounds[i]`, and above the bound before, are counted in `counts[i]`."""

    __slots__ = ("bounds", "count", "counts", "high", "low", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0
        self.low = float("inf")
        self.high = float("-inf")

    def bucket(self, value: float) -> int:
        return bisect_left(self.bounds, value)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.total += value
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value

    def merge(self, other: Distribution) -> None:
        """Adds another one of the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.count += other.count
        self.total += other.total
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)


@dataclass(slots=True)
class RoundTotals:
    """What rounds came to. Lists are indexed by position in the draft, 0 first."""

    duration: Distribution = field(default_factory=partial(Distribution, SECONDS))
    stages: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution(SECONDS) for name in STAGES})
    verify_budget: Distribution = field(default_factory=partial(Distribution, TOKENS))
    # One value a decoding request and round:
    accepted_length: Distribution = field(default_factory=partial(Distribution, LENGTHS))
    # |predicted − measured| ÷ measured:
    cost_error: Distribution = field(default_factory=partial(Distribution, ERRORS))
    stops: dict[str, int] = field(default_factory=dict)
    sittings: dict[str, int] = field(default_factory=dict)  # one count a decoding request and round
    verified: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)  # verified, with all before accepted
    accepted: list[int] = field(default_factory=list)
    # By predicted probability that a position and all before it are accepted: verified, Σ predicted, accepted.
    calibration: list[list[float]] = field(default_factory=lambda: [[0, 0.0, 0] for _ in range(CALIBRATION_BINS)])

    def add(self, record: RoundRecord) -> None:
        """Counts one round."""
        self.duration.add(record.measured_s)
        stages = self.stages
        stages["draft"].add(record.draft_s)
        stages["verify"].add(max(record.verify_s - record.decide_s, 0.0))
        stages["absorb"].add(record.absorb_s)
        stages["decide"].add(record.decide_s)
        if record.measured_s > 0:
            self.cost_error.add(abs(record.predicted_s - record.measured_s) / record.measured_s)
        self.verify_budget.add(record.verified)
        _count(self.stops, _STOPS[record.stop])
        for request in record.requests:
            _count(self.sittings, _SITTINGS[request.sitting])
            self.accepted_length.add(request.accepted + 1)
            if request.verified:
                self._verify(request.verified, request.accepted, request.survival)

    def _verify(self, verified: int, accepted: int, survival: Sequence[float]) -> None:
        if (missing := verified - len(self.verified)) > 0:
            for counts in (self.verified, self.reached, self.accepted):
                counts.extend([0] * missing)
        all_verified, reached, all_accepted = self.verified, self.reached, self.accepted
        for position in range(verified):
            all_verified[position] += 1
        for position in range(accepted):
            reached[position] += 1
            all_accepted[position] += 1
        if accepted < verified:
            reached[accepted] += 1
        calibration = self.calibration
        for position, predicted in enumerate(survival[:verified]):
            entry = calibration[min(int(predicted * CALIBRATION_BINS), CALIBRATION_BINS - 1)]
            entry[0] += 1
            entry[1] += predicted
            if position < accepted:
                entry[2] += 1

    def merge(self, other: RoundTotals) -> None:
        """Adds the rounds of another."""
        for name in ("duration", "verify_budget", "accepted_length", "cost_error"):
            getattr(self, name).merge(getattr(other, name))
        for stage, times in other.stages.items():
            self.stages[stage].merge(times)
        for name in ("stops", "sittings"):
            for key, count in getattr(other, name).items():
                _count(getattr(self, name), key, count)
        for name in ("verified", "reached", "accepted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.extend([0] * (len(theirs) - len(mine)))
            for position, count in enumerate(theirs):
                mine[position] += count
        for bin_, added in zip(self.calibration, other.calibration, strict=True):
            bin_[:] = [old + new for old, new in zip(bin_, added, strict=True)]

    def clear(self) -> None:
        """Forgets everything."""
        fresh = RoundTotals()
        for part in fields(self):
            setattr(self, part.name, getattr(fresh, part.name))


def expected_calibration_error(bins: Sequence[Sequence[float]]) -> float:
    """ECE: Σ over bins of share × |mean predicted − share accepted|; 0 without data."""
    total = sum(count for count, _, _ in bins)
    return sum(abs(predicted - accepted) for _, predicted, accepted in bins) / total if total else 0.0


def _count(counts: dict[str, int], key: str, by: int = 1) -> None:
    counts[key] = counts.get(key, 0) + by
