"""Medians, bootstrap intervals and the summary of a load sweep. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.schedule.cost import CostTable
from engine.schedule.replay import clairvoyant

if TYPE_CHECKING:
    from tests.bench.load_client import Segment

RESAMPLES = 2000
Array = np.ndarray
AUTO, MTP, KNOWN = "dspark-auto", "mtp1", "dspark-fixed-7"


@dataclass(frozen=True, slots=True)
class Point:
    """One arm at one concurrency: medians over repeats, 95 % bootstrap intervals, and the repeats themselves."""

    arm: str
    concurrency: int
    tokens_per_s: float
    tokens_per_s_interval: tuple[float, float]
    tokens_per_s_per_user_p50: float
    tokens_per_s_per_user_p50_interval: tuple[float, float]
    mean_accepted_length: float
    mean_verify_budget: float
    draft_skip_share: float
    repeats: int
    tokens_per_s_repeats: tuple[float, ...]
    # Cores that were busy: the server's front process, the engine, and the load's own process.
    front_cores: float
    engine_cores: float
    client_cores: float

    @classmethod
    def of(cls, arm: str, concurrency: int, segments: Sequence[Segment], cpu_s: Sequence[float]) -> Point:
        rounds = max(sum(s.rounds for s in segments), 1)
        speeds = [s.tokens_per_s for s in segments]
        users = [s.user_rate for s in segments]
        seconds = sum(s.seconds for s in segments)
        finished_rounds = max(sum(s.finished_rounds for s in segments), 1)
        return cls(
            arm=arm,
            concurrency=concurrency,
            tokens_per_s=float(np.median(speeds)),
            tokens_per_s_interval=interval([speeds], lambda m: m[0]),
            tokens_per_s_per_user_p50=float(np.median(users)),
            tokens_per_s_per_user_p50_interval=interval([users], lambda m: m[0]),
            mean_accepted_length=1 + sum(s.accepted for s in segments) / rounds,
            mean_verify_budget=sum(s.verified for s in segments) / rounds,
            draft_skip_share=sum(s.skipped_rounds for s in segments) / finished_rounds,
            repeats=len(segments),
            tokens_per_s_repeats=tuple(speeds),
            front_cores=cpu_s[0] / seconds,
            engine_cores=cpu_s[1] / seconds,
            client_cores=cpu_s[2] / seconds,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, to four digits behind the point."""

        def short(value: Any) -> Any:
            return [round(v, 4) for v in value] if isinstance(value, tuple) else value

        plain = {name: short(value) for name, value in asdict(self).items()}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in plain.items()}


def interval(arms: Sequence[Sequence[float]], figure: Callable[[Array], Array]) -> tuple[float, float]:
    """95 % bootstrap interval of a figure of the arms' medians; repeats are drawn together, as they were measured.

    Args:
        arms: [A][n] one value a repeat.
        figure: medians [A, …] to values […].
    """
    count = min(len(values) for values in arms)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    medians = np.array([np.median(np.asarray(values)[draws], axis=1) for values in arms])
    low, high = np.quantile(figure(medians), [0.025, 0.975])
    return float(low), float(high)


def summarise(
    points: Sequence[Point],
    records: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    tables: Mapping[str, CostTable],
) -> dict[str, Any]:
    """What the sweep says of dspark-auto.

    Args:
        records: of watched segments, by (arm, concurrency).
        tables: measured costs, by drafter.
    """
    by_key = {(point.arm, point.concurrency): point for point in points}
    concurrencies = sorted({point.concurrency for point in points})
    summary: dict[str, Any] = {"auto_over_best_other": [], "clairvoyant": [], "over_mtp1": [], "predicted": []}
    for concurrency in concurrencies:
        auto = by_key.get((AUTO, concurrency))
        others = [p for p in points if p.concurrency == concurrency and p.arm != AUTO]
        if auto is not None and others:
            summary["auto_over_best_other"].append(_beside(auto, others))
        known, plain = records.get((KNOWN, concurrency)), by_key.get(("plain", concurrency))
        if auto is not None and plain is not None and known and "dspark" in tables:
            summary["clairvoyant"].append(_share(auto, plain, known, tables))
        if seen := records.get((AUTO, concurrency)):
            summary["predicted"].append({"concurrency": concurrency, **predicted(seen)})
    curves = {arm: [p for p in points if p.arm == arm] for arm in (AUTO, MTP)}
    if all(curves.values()):
        summary["over_mtp1"] = at_equal_throughput(curves[AUTO], curves[MTP])
    return summary


def _beside(auto: Point, others: Sequence[Point]) -> dict[str, Any]:
    best = max(others, key=lambda point: point.tokens_per_s)
    repeats = [auto.tokens_per_s_repeats, *(other.tokens_per_s_repeats for other in others)]
    low, high = interval(repeats, lambda medians: medians[0] / medians[1:].max(axis=0))
    ratio = auto.tokens_per_s / best.tokens_per_s
    return {"concurrency": auto.concurrency, "best": best.arm, "ratio": ratio, "interval": [low, high]}


def _share(
    auto: Point, plain: Point, known: Sequence[Mapping[str, Any]], tables: Mapping[str, CostTable]
) -> dict[str, Any]:
    """Measured gain of auto over plain, as a share of what clairvoyance would gain on fully verified rounds."""
    bound = clairvoyant(known, tables["dspark"], tables.get("none"))
    gained = auto.tokens_per_s / plain.tokens_per_s
    share = (gained - 1) / (bound.gain - 1) if bound.gain > 1 else None
    return {
        "concurrency": auto.concurrency,
        "rounds": bound.rounds,
        "clairvoyant_over_plain": bound.gain,
        "auto_over_plain": gained,
        "share": share,
    }


def predicted(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How well the scheduler foresaw its rounds, and what deciding cost."""
    measured_s = sum(r["measured_s"] for r in records) or 1.0
    accepted = sum(r["accepted"] for r in records)
    return {
        "accepts_over_actual": sum(r["predicted_accepts"] for r in records) / accepted if accepted else 1.0,
        "time_over_actual": sum(r["predicted_s"] for r in records) / measured_s,
        "median_time_over_actual": float(np.median([r["predicted_s"] / r["measured_s"] for r in records])),
        "deciding_share": sum(r["decide_s"] for r in records) / measured_s,
    }


def at_equal_throughput(ours: Sequence[Point], theirs: Sequence[Point]) -> list[dict[str, float]]:
    """Tokens/s per user, ours ÷ theirs, at each throughput of theirs that our curve reaches; linear between points."""
    found = []
    frontier = _frontier(ours)
    for x, y in _frontier(theirs):
        if frontier[0][0] <= x <= frontier[-1][0]:
            mine = float(np.interp(x, [a for a, _ in frontier], [b for _, b in frontier]))
            found.append({"tokens_per_s": x, "ours": mine, "theirs": y, "ratio": mine / y})
    return found


def _frontier(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(throughput, tokens/s per user) that no other point of the curve beats in both; by rising throughput."""
    pairs = sorted((p.tokens_per_s, p.tokens_per_s_per_user_p50) for p in points)
    return [(x, y) for i, (x, y) in enumerate(pairs) if all(y > later for _, later in pairs[i + 1 :])]


def text(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = ["", "dspark-auto ÷ the best other arm (95 % interval)"]
    for row in summary["auto_over_best_other"]:
        low, high = row["interval"]
        lines.append(f"  {row['concurrency']:4d}  {row['ratio']:.3f}  ({low:.3f} … {high:.3f})  best: {row['best']}")
    if summary["clairvoyant"]:
        lines.append("of what a clairvoyant schedule would gain over plain decoding on the same rounds")
    for row in summary["clairvoyant"]:
        share = "–" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(
            f"  {row['concurrency']:4d}  {share:>5s}  (clairvoyant {row['clairvoyant_over_plain']:.2f} × plain,"
            f" auto {row['auto_over_plain']:.2f} ×)"
        )
    if summary["over_mtp1"]:
        lines.append("tokens/s per user ÷ MTP-1's, at equal throughput")
    for row in summary["over_mtp1"]:
        lines.append(f"  at {row['tokens_per_s']:6.0f} tokens/s  {row['ratio']:.2f}")
    if summary["predicted"]:
        lines.append("dspark-auto's own forecasts ÷ what came (accepts, time), and deciding's share of a round")
    for row in summary["predicted"]:
        lines.append(
            f"  {row['concurrency']:4d}  accepts {row['accepts_over_actual']:.3f}  time {row['time_over_actual']:.3f}"
            f"  (median round {row['median_time_over_actual']:.3f})  deciding {row['deciding_share']:.1%}"
        )
    return "\n".join(lines)
