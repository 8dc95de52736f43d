"""Medians, agreement of texts, and the Markdown table. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

OURS = "ours"


@dataclass(slots=True)
class Point:
    """One arm at one number of requests: a speed a repeat, and the texts of the last one."""

    workload: str
    arm: str
    requests: int
    tokens_per_s_repeats: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return median(self.tokens_per_s_repeats)


def agreement(texts: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> tuple[int, float]:
    """How many texts equal the reference's, and the mean share of a text before the first difference."""
    same = sum(list(a) == list(b) for a, b in zip(texts, reference, strict=True))
    shares = [common(a, b) / max(len(b), 1) for a, b in zip(texts, reference, strict=True)]
    return same, sum(shares) / max(len(shares), 1)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def records(points: Sequence[Point]) -> list[dict[str, Any]]:
    """JSON-ready lines. `ours_over_this` is the ratio of medians; None where ours did not run."""
    ours = {(p.workload, p.requests): p for p in points if p.arm == OURS}
    lines = []
    for point in points:
        line = {key: value for key, value in asdict(point).items() if key != "texts"}
        line["tokens_per_s_repeats"] = [round(speed, 1) for speed in point.tokens_per_s_repeats]
        line["tokens_per_s"] = round(point.tokens_per_s, 1)
        base = ours.get((point.workload, point.requests))
        line["ours_over_this"] = round(base.tokens_per_s / point.tokens_per_s, 3) if base else None
        if base:
            same, share = agreement(point.texts, base.texts)
            line["texts_as_ours"], line["share_before_difference"] = same, round(share, 4)
        lines.append(line)
    return lines


def table(about: str, points: Sequence[Point], single: Sequence[str], left_out: Mapping[str, str]) -> str:
    """One workload's Markdown table: tokens/s of all requests together, and ours ÷ that arm.

    Args:
        single: arms that take one request at a time.
    """
    counts = sorted({point.requests for point in points})
    by_key = {(p.arm, p.requests): line for p, line in zip(points, records(points), strict=True)}
    heads = [f"{count} request{'s' if count > 1 else ''}" for count in counts]
    lines = [f"### {about}", "", f"| tokens/s (ours ÷ this) | {' | '.join(heads)} | texts as ours |"]
    lines.append("|" + "---|" * (len(counts) + 2))
    for arm in dict.fromkeys(point.arm for point in points):
        cells, last = [], None
        for count in counts:
            line = by_key.get((arm, count))
            last = line or last
            cells.append(_cell(line) if line else ("as at 1" if arm in single else "–"))
        texts = f"{last['texts_as_ours']} of {last['requests']}" if last and "texts_as_ours" in last else "–"
        lines.append(f"| {arm} | {' | '.join(cells)} | {texts} |")
    if left_out:
        lines += ["", "Left out: " + "; ".join(f"{arm} ({reason})" for arm, reason in left_out.items()) + "."]
    return "\n".join(lines)


def _cell(line: Mapping[str, Any]) -> str:
    speed = f"{line['tokens_per_s']:,.0f}" if line["tokens_per_s"] >= 100 else f"{line['tokens_per_s']:.1f}"
    ratio = line["ours_over_this"]
    return speed if ratio is None or line["arm"] == OURS else f"{speed} ({ratio:.2f} ×)"
