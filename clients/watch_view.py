"""How decision records look: charts over the last seconds, and one decision with its reasons."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clients.scheduler import Record
from clients.trend import Second, Trend

SECONDS = 240  # that charts can show
STOPS = {
    "nobody": "nobody drafted",
    "everything": "every candidate was taken",
    "no_gain": "the next candidate would not have paid",
    "budget": "the budget was spent",
    "rule": "the policy's fixed rule",
}
SITTINGS = {
    "drafts": "drafts, it pays",
    "asked": "drafts, asked to",
    "probe": "drafts, a probe",
    "no_gain": "out, no gain",
    "off": "out, forbidden",
    "no_room": "out, no room",
    "check": "out, a check",
    "lookup": "copies",
}
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_LABEL = 26  # columns left of a chart


def screen(trend: Trend, title: str, width: int, height: int) -> RenderableType:
    """The whole terminal: charts above, the newest decision below."""
    now = trend.recent(3)
    columns = max(min(width - _LABEL - 6, SECONDS), 8)
    rows = 2 if height < 30 else 3
    seconds = list(trend.seconds)[-1 - columns : -1]  # the newest second is not over
    charts = Table.grid(padding=(0, 1))
    charts.add_column(width=_LABEL)
    charts.add_column()
    for name, unit, colour, values, value in (
        ("tokens/s", ".0f", "green", [s.tokens_per_s for s in seconds], now.tokens_per_s / 3),
        ("accepted length", ".2f", "cyan", [s.accepted_length for s in seconds], now.accepted_length),
        ("verify budget", ".2f", "yellow", [s.verify_budget for s in seconds], now.verify_budget),
    ):
        label = Text.assemble(
            (f"{name}\n", "bold"), f"now {value:{unit}}", f"\nmost {max(values):{unit}}"[: 99 * (rows > 2)]
        )
        charts.add_row(label, Text("\n".join(chart(values, rows)), style=colour))
    parts: list[RenderableType] = [Panel(charts, title=title, subtitle=f"last {columns} s"), Text(summary(trend, now))]
    if trend.last is not None:
        left = height - 3 * rows - 3 - 9  # lines for requests
        parts.append(Panel(decision(trend.last, width - 4, max(left, 1)), title="the newest decision, and why"))
    else:
        parts.append(Text("no round yet: the server is idle", style="dim"))
    return Group(*parts)


def chart(values: Sequence[float], rows: int) -> list[str]:
    """Bars from 0 to the largest value, one column a value, top line first."""
    most = max(values, default=0.0) or 1.0
    heights = [round(8 * rows * value / most) for value in values]
    heights = [max(height, 1) if value > 0 else 0 for height, value in zip(heights, values, strict=True)]
    return ["".join(_EIGHTHS[min(max(h - 8 * row, 0), 8)] for h in heights) for row in reversed(range(rows))]


def summary(trend: Trend, now: Second) -> str:
    """How well the last seconds were predicted, and what deciding cost."""
    lost = f" · {trend.lost} rounds lost, this reader is too slow" if trend.lost else ""
    if not now.records:
        return f"idle{lost}"
    accepts = f"{now.predicted_accepts / now.accepted:.2f} ×" if now.accepted else "–"
    return (
        f"{now.rounds / 3:.0f} rounds/s of {now.measured_s / now.records * 1e3:.2f} ms"
        f" · predicted ÷ actual: time {now.predicted_s / now.measured_s:.2f} ×, accepts {accepts}"
        f" · deciding {now.decide_s / now.measured_s:.1%} · draft-skip share {now.skip_share:.0%}{lost}"
    )


def line(trend: Trend) -> str:
    """The last whole second in one line, for what is no terminal."""
    clock, last, now = time.strftime("%H:%M:%S"), trend.last, trend.recent(1)
    lost = f" lost {trend.lost}" if trend.lost else ""
    if last is None or not now.records:
        return f"{clock} idle{lost}"
    return (
        f"{clock} {last['policy']} running {last['running']} waiting {last['waiting']}"
        f" tokens/s {now.tokens_per_s:.0f} accepted-length {now.accepted_length:.2f}"
        f" verify-budget {now.verify_budget:.2f} draft-skip {now.skip_share:.0%}"
        f" round {now.measured_s / now.records * 1e3:.2f} ms (predicted {now.predicted_s / now.records * 1e3:.2f})"
        f" stop: {STOPS.get(last['stop'], last['stop'])}{lost}"
    )


def decision(record: Record, width: int, most: int = 16) -> RenderableType:
    """One round: what was decided, why, and what came of it.

    Args:
        most: requests to list.
    """
    requests = record["requests"]
    drafting = sum(request["drafted"] > 0 for request in requests)
    prompt = f" · {record['prefill_rows']} prompt rows" if record["prefill_rows"] else ""
    head = Text.assemble(
        (f"round {record['round']}", "bold"),
        f" · policy {record['policy']} · {record['running']} running, {record['waiting']} waiting{prompt}\n",
        f"{drafting} of {len(requests)} drafted · verified {record['verified']} of {record['candidates']} candidates",
        " · ",
        (STOPS.get(record["stop"], str(record["stop"])), "bold yellow"),
        f"\nexpected {record['predicted_accepts']:.1f} accepts in {record['predicted_s'] * 1e3:.2f} ms"
        f" · came {record['accepted']} in {record['measured_s'] * 1e3:.2f} ms"
        f" (draft {record['draft_s'] * 1e3:.2f}, verify {record['verify_s'] * 1e3:.2f},"
        f" absorb {record['absorb_s'] * 1e3:.2f}, of it deciding {record['decide_s'] * 1e3:.2f})"
        f" · a second is worth {record['price']:.0f} tokens",
    )
    if not requests:
        return head
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, least in (
        ("request", 12),
        ("why", 16),
        ("context", 7),
        ("verified", 8),
        ("accepted", 8),
        ("survival", 27),
    ):
        right = name in ("context", "verified", "accepted")
        table.add_column(name, no_wrap=True, min_width=least, justify="right" if right else "left")
    shown = sorted(requests, key=lambda r: -r["verified"])[:most]
    for request in shown:
        weight = f" × {request['weight']:.2g}" if request["weight"] != 1 else ""
        survival = Text(" ").join(
            Text(
                f"{a:.2f}".removeprefix("0"),
                style="green" if k < request["accepted"] else "red" if k < request["verified"] else "dim",
            )
            for k, a in enumerate(request["survival"])
        )
        table.add_row(
            request["request_id"][:20] + weight,
            SITTINGS.get(request["sitting"], request["sitting"]),
            str(request["context"]),
            f"{request['verified']} of {len(request['survival'])}",
            str(request["accepted"]),
            survival,
        )
    more = len(requests) - len(shown)
    return Group(head, table, Text(f"… and {more} more", style="dim")) if more else Group(head, table)
