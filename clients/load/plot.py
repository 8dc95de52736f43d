"""One picture of a run: what its users saw, and when. Needs matplotlib (requirements/train.txt)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clients.load.report import changes, waits
from clients.load.runner import CANCELLED, FAILED, FINISHED, Sample

_COLOURS = {FINISHED: "#1f6fb2", CANCELLED: "#9a9a9a", FAILED: "#c8321f"}
_LATENCIES = (
    ("end to end", "#7a5195", lambda s: s.e2e_s if s.outcome == FINISHED else None, lambda s: True),
    ("first token", "#1f6fb2", lambda s: s.ttft_s, lambda s: s.first_s is None),
    ("each token after", "#1a7f37", lambda s: s.tpot_s, lambda s: False),
)
_TAIL = (0.5, 0.1, 0.05, 0.01, 0.001)  # slower than the percentiles that the axis names
_BINS = 120


def plotting_missing() -> str:
    """What to do about it; nothing when plots can be drawn."""
    if find_spec("matplotlib") is not None:
        return ""
    return "matplotlib is not installed: pip install -r requirements/train.txt"


def draw(report: dict[str, Any], samples: Sequence[Sample], tokens_by_second: Counter[int], path: Path) -> None:
    """Writes the picture; the name's ending says in which format.

    Raises:
        OSError: the file cannot be written.
        ValueError: an ending that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    (first, tail), (busy, drafts) = figure.subplots(2, 2, width_ratios=(3, 2))
    first.sharex(busy)
    figure.suptitle(_title(report), fontsize=11)
    _first_tokens(first, report, samples)
    _tails(tail, report, samples)
    _throughput(busy, samples, tokens_by_second)
    _acceptance(drafts, report["speculation"])
    for axes in (first, tail, busy, drafts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _title(report: dict[str, Any]) -> str:
    server, workload, counts = report["server"], report["workload"], report["requests"]
    errors = "".join(f" · {count} {code}" for code, count in report["errors"].items())
    return (
        f"{server['model']} ({server['device']}, drafter {server['drafter']}, policy {server['policy']})"
        f" under {workload['rate']:.3g} requests/s\n{counts['offered']} offered · {counts[FINISHED]} finished"
        f" · {counts[CANCELLED]} cancelled{errors} · {report['tokens_per_s']:.0f} tokens/s"
    )


def _first_tokens(axes: Any, report: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Each request by its scheduled arrival: a queue that builds up is a slope."""
    for outcome in (FINISHED, CANCELLED):
        own = [(s.scheduled_s, s.ttft_s) for s in samples if s.outcome == outcome and s.ttft_s is not None]
        if own:
            axes.scatter(*zip(*own, strict=True), s=14, alpha=0.7, linewidths=0, color=_COLOURS[outcome], label=outcome)
    failed = [(s.scheduled_s, s.ttft_s or s.e2e_s) for s in samples if s.outcome == FAILED]
    if failed:
        axes.scatter(
            *zip(*failed, strict=True), s=26, marker="x", color=_COLOURS[FAILED], label="failed, when it ended"
        )
    if warmup := report["workload"]["warmup_s"]:
        axes.axvspan(0, warmup, color="#dddddd", alpha=0.6, linewidth=0, label="warm-up, not counted")
    axes.set(xlabel="scheduled arrival, s", yscale="log", title="Time to first token of each request")
    _milliseconds(axes.yaxis)
    axes.grid(alpha=0.25, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best", framealpha=0.9)


def _tails(axes: Any, report: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Latency by percentile; the axis stretches the tail, as far as there are requests to fill it."""
    counted = [s for s in samples if s.scheduled_s >= report["workload"]["warmup_s"]]
    most = 1
    for label, colour, time_of, bounded in _LATENCIES:
        times, _ = waits(counted, time_of, bounded)
        if times:
            most = max(most, len(times))
            slower = [1 - i / len(times) for i in range(len(times))]  # share of requests at least so slow
            axes.plot(slower, times, drawstyle="steps-post", color=colour, linewidth=1.8, label=label)
    ticks = [1.0, *(share for share in _TAIL if share * most >= 1)]
    axes.set(xscale="log", yscale="log", title="Latency by percentile", xlabel="percentile", xlim=(1.0, 0.8 / most))
    axes.set_xticks(ticks, [f"{100 * (1 - share):g}" for share in ticks])
    axes.xaxis.minorticks_off()
    _milliseconds(axes.yaxis)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best", framealpha=0.9)


def _throughput(axes: Any, samples: Sequence[Sample], tokens_by_second: Counter[int]) -> None:
    """Tokens a second, and on an axis of its own how many requests were under way."""
    last = max(tokens_by_second, default=0) + 1
    width = -(-last // _BINS)
    bins = [sum(tokens_by_second[second] for second in range(at, at + width)) / width for at in range(0, last, width)]
    starts = [at * width for at in range(len(bins))]
    axes.bar(starts, bins, width=width, align="edge", color="#8fbfe0", linewidth=0)
    axes.set(xlabel="s after the start", xlim=(0, None), title="Throughput and requests in flight")
    axes.set_ylabel("tokens/s, bars", color=_COLOURS[FINISHED])
    axes.set_ylim(0, max(bins, default=1) * 1.25 or 1)
    running, times, levels = 0, [0.0], [0]
    for when, change in changes(samples):
        running += change
        times.append(when)
        levels.append(running)
    beside = axes.twinx()
    beside.plot(times, levels, drawstyle="steps-post", color="#d97706", linewidth=1.3)
    beside.set_ylabel("in flight, line", color="#b45309")
    beside.set_ylim(0, max(levels) * 1.15 + 0.5)
    beside.yaxis.get_major_locator().set_params(integer=True)
    beside.spines["top"].set_visible(False)


def _acceptance(axes: Any, speculation: dict[str, Any]) -> None:
    """How many tokens were verified at each draft position, and how many of them held."""
    verified, accepted = speculation["verified_by_position"], speculation["accepted_by_position"]
    length = speculation["mean_accepted_length"]
    axes.set(title="Draft tokens" + (f": mean accepted length {length:.2f}" if length is not None else ""))
    if not any(verified):
        axes.text(0.5, 0.5, "none were verified", ha="center", va="center", transform=axes.transAxes, color="#777777")
        axes.set_axis_off()
        return
    positions = range(1, len(verified) + 1)
    axes.bar(positions, verified, color="#d9d9d9", label="verified")
    axes.bar(positions, accepted, color="#1a7f37", label="accepted")
    for position, all_, held in zip(positions, verified, accepted, strict=True):
        if all_:
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{held / all_:.0%}", (position, all_), fontsize=8, **place)
    axes.set(xlabel="position in the draft", ylabel="tokens", xticks=list(positions))
    axes.margins(y=0.12)
    axes.legend(fontsize=8)


def _milliseconds(axis: Any) -> None:
    """Ticks of a logarithmic axis in seconds, as people say them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"))
    axis.set_minor_formatter(NullFormatter())
