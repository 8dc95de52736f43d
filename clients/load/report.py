"""What a run's samples add up to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clients.load.runner import CANCELLED, FAILED, FINISHED, WAITING, Sample

PERCENTILES = (50, 90, 95, 99)
LAG_S = 0.02  # a 99th percentile above this is the generator's fault, not the server's


@dataclass(frozen=True, slots=True)
class Goals:
    """What a user calls fast enough, in seconds; None: anything."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, sample: Sample) -> bool:
        """A finished request, fast enough in both; one of a single message has no time per token."""
        return (
            sample.outcome == FINISHED
            and (self.ttft_s is None or (sample.ttft_s is not None and sample.ttft_s <= self.ttft_s))
            and (self.tpot_s is None or sample.tpot_s is None or sample.tpot_s <= self.tpot_s)
        )


def make_report(samples: Sequence[Sample], goals: Goals, *, warmup_s: float = 0.0) -> dict[str, Any]:
    """Counts, rates, latencies and acceptance of the requests scheduled from `warmup_s` on.

    Latencies are in seconds from the *scheduled* arrival. Requests that their deadline ended count with the time that
    they waited, in the time to the first token when they had none, and in the end-to-end time: lower bounds, counted as
    `at_deadline`, without which the slowest requests would be missing just where they are slowest.
    """
    counted = [sample for sample in samples if sample.scheduled_s >= warmup_s]
    outcomes = Counter(sample.outcome for sample in counted)
    ends = [sample.end_s for sample in counted if sample.end_s is not None]
    seconds = max(max(ends, default=0.0) - warmup_s, 1e-9)
    tokens = sum(sample.tokens for sample in counted)
    prompt = sum(sample.prompt_tokens for sample in counted)
    cached = sum(sample.cached_tokens for sample in counted)
    report: dict[str, Any] = {
        "requests": {
            "offered": len(counted),
            **{outcome: outcomes[outcome] for outcome in (FINISHED, CANCELLED, FAILED, WAITING)},
            "warmup": len(samples) - len(counted),
        },
        "errors": dict(Counter(sample.code for sample in counted if sample.outcome == FAILED).most_common()),
        "finish_reasons": dict(Counter(sample.reason for sample in counted if sample.reason).most_common()),
        "seconds": seconds,
        "finished_per_s": outcomes[FINISHED] / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": {"prompt": prompt, "cached": cached, "completion": tokens},
        "most_in_flight": most_in_flight(counted),
        "ttft_s": _latency(counted, lambda s: s.ttft_s, lambda s: s.first_s is None),
        "tpot_s": _latency(counted, lambda s: s.tpot_s),
        "e2e_s": _latency(counted, lambda s: s.e2e_s if s.outcome == FINISHED else None, lambda s: True),
        "longest_gap_s": _latency(counted, lambda s: s.longest_gap_s),
        "server_queue_s": _latency(counted, lambda s: s.queue_s),
        "send_lag_s": _latency(counted, lambda s: s.sent_s - s.scheduled_s),
        "speculation": _speculation(counted),
    }
    if goals != Goals():
        judged = [sample for sample in counted if sample.outcome in (FINISHED, FAILED)]
        met = sum(goals.met_by(sample) for sample in judged)
        report["goals"] = {
            "ttft_s": goals.ttft_s,
            "tpot_s": goals.tpot_s,
            "judged": len(judged),
            "met": met,
            "share": met / len(judged) if judged else None,
        }
    return report


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly (numpy's default)."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def waits(
    samples: Iterable[Sample], time_of: Callable[[Sample], float | None], bounded: Callable[[Sample], bool]
) -> tuple[list[float], int]:
    """Times in ascending order, with how many of them are lower bounds, of requests that met their deadline first."""
    times, at_deadline = [], 0
    for sample in samples:
        if sample.code == "DEADLINE_EXCEEDED" and bounded(sample):
            assert sample.e2e_s is not None
            times.append(sample.e2e_s)
            at_deadline += 1
        elif (value := time_of(sample)) is not None:
            times.append(value)
    return sorted(times), at_deadline


def _latency(
    samples: Iterable[Sample],
    time_of: Callable[[Sample], float | None],
    bounded: Callable[[Sample], bool] = lambda sample: False,
) -> dict[str, Any]:
    times, at_deadline = waits(samples, time_of, bounded)
    summary: dict[str, Any] = {"count": len(times), "at_deadline": at_deadline}
    if times:
        summary["mean"] = sum(times) / len(times)
        summary |= {f"p{percent}": percentile(times, percent) for percent in PERCENTILES}
        summary["max"] = times[-1]
    return summary


def most_in_flight(samples: Iterable[Sample]) -> int:
    """Requests that ran at once."""
    running = most = 0
    for _, change in changes(samples):
        running += change
        most = max(most, running)
    return most


def changes(samples: Iterable[Sample]) -> list[tuple[float, int]]:
    """(when, +1 or -1) for every request sent or ended, in order; an end before a start at the same time."""
    steps = []
    for sample in samples:
        steps.append((sample.sent_s, 1))
        if sample.end_s is not None:
            steps.append((sample.end_s, -1))
    return sorted(steps)


def _speculation(samples: Iterable[Sample]) -> dict[str, Any]:
    """Sums over finished requests, each as the server counted it."""
    summaries = [sample.speculation for sample in samples if sample.speculation is not None]
    rounds = sum(summary.rounds for summary in summaries)
    committed = sum(summary.mean_accepted_length * summary.rounds for summary in summaries)
    verified = _by_position(summary.verified_by_position for summary in summaries)
    accepted = _by_position(summary.accepted_by_position for summary in summaries)
    return {
        "rounds": rounds,
        "drafted": sum(summary.drafted for summary in summaries),
        "verified": sum(summary.verified for summary in summaries),
        "accepted": sum(summary.accepted for summary in summaries),
        "mean_accepted_length": committed / rounds if rounds else None,
        "verified_by_position": verified,
        "accepted_by_position": accepted,
        # Not `acceptance_by_position`: summaries do not tell how often all before a position held, if it never did.
        "accepted_share_by_position": [a / v if v else None for a, v in zip(accepted, verified, strict=True)],
    }


def _by_position(lists: Iterable[Sequence[int]]) -> list[int]:
    totals: list[int] = []
    for counts in lists:
        totals += [0] * (len(counts) - len(totals))
        for position, count in enumerate(counts):
            totals[position] += count
    return totals


def warnings(report: dict[str, Any]) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    if (lag := report["send_lag_s"].get("p99", 0.0)) > LAG_S:
        found.append(
            f"requests left up to {lag * 1e3:.0f} ms late (p99): this generator was too slow for the rate;"
            " latencies include it, so lower the rate or run several"
        )
    if waiting := report["requests"][WAITING]:
        found.append(f"stopped with {waiting} requests under way: the slowest are missing")
    return found
