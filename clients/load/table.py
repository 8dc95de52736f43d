"""A report as people read it."""

from __future__ import annotations

from typing import Any

from clients.load.report import PERCENTILES

_ROWS = (
    ("ttft_s", "first token"),
    ("tpot_s", "each token after"),
    ("e2e_s", "end to end"),
    ("longest_gap_s", "longest pause"),
    ("server_queue_s", "in the queue"),
)


def lines(report: dict[str, Any]) -> list[str]:
    """A dozen lines."""
    server, workload = report["server"], report["workload"]
    counts, tokens = report["requests"], report["tokens"]
    kinds = f", burstiness {workload['burstiness']:g}" if workload["burstiness"] not in (None, 1) else ""
    told = [
        f"{server['model']} on {server['device']}, {server['dtype']}, drafter {server['drafter']},"
        f" policy {server['policy']}",
        f"{workload['rate']:.4g} requests/s ({workload['arrivals']}{kinds}) · {counts['offered']} offered: "
        + " · ".join(f"{count} {name}" for name, count in counts.items() if name not in ("offered",) and count),
    ]
    if report["errors"]:
        told.append("errors: " + " · ".join(f"{code} {count}" for code, count in report["errors"].items()))
    names = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    told.append(f"{'milliseconds':18}" + "".join(f"{name:>10}" for name in names) + f"{'requests':>10}")
    for key, label in _ROWS:
        summary = report[key]
        figures = "".join(f"{summary[name] * 1e3:10.1f}" if name in summary else f"{'–':>10}" for name in names)
        late = f"  (of them {summary['at_deadline']} gave up: lower bounds)" if summary["at_deadline"] else ""
        told.append(f"{label:18}{figures}{summary['count']:10}{late}")
    cached = tokens["cached"] / tokens["prompt"] if tokens["prompt"] else 0.0
    told.append(
        f"{report['tokens_per_s']:.0f} tokens/s · {report['finished_per_s']:.2f} finished/s"
        f" · at most {report['most_in_flight']} in flight · {cached:.0%} of prompt tokens cached"
    )
    speculation = report["speculation"]
    if speculation["mean_accepted_length"] is not None:
        shares = " ".join("–" if s is None else f"{s:.0%}" for s in speculation["accepted_share_by_position"])
        told.append(
            f"mean accepted length {speculation['mean_accepted_length']:.2f}"
            + (f" · accepted ÷ verified by position: {shares}" if shares else "")
        )
    if goals := report.get("goals"):
        wished = [f"{label} {goals[key] * 1e3:g} ms" for key, label in _ROWS if goals.get(key) is not None]
        share = "–" if goals["share"] is None else f"{goals['share']:.1%}"
        told.append(f"within {' and '.join(wished)}: {share} ({goals['met']} of {goals['judged']})")
    return told
