"""What a soak was to show, and what it showed, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.soak.faults import END_S, LATE, USUAL
from tests.soak.overload import FACTOR, MAX_RATIO, MAX_REFUSAL_S

Row = tuple[str, str, str, bool | None]  # what, asked, measured, met; None: too short a run to say


def table(result: Mapping[str, Any]) -> str:
    """The result of `python -m tests.soak` for people."""
    rows: list[Row] = [("what", "asked", "measured", None)]
    for part, lines in (("soak", _soak), ("kills", _kills), ("drain", _drain), ("overload", _overload)):
        if part in result:
            rows += lines(result[part])
    ends = [result[name] for name in ("end", "overload_end") if name in result]
    codes, tracebacks = [each["exit_code"] for each in ends], sum(each["tracebacks"] for each in ends)
    rows.append(
        ("servers' ends", "code 0, no traceback", f"codes {codes}, {tracebacks} tracebacks", all(e["ok"] for e in ends))
    )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]  # type: ignore[arg-type]
    lines = []
    for number, (what, asked, measured, met) in enumerate(rows):
        verdict = "met" if number == 0 else {True: "yes", False: "NO", None: "(too short a run)"}[met]
        lines.append(f"{what:{widths[0]}}  {asked:{widths[1]}}  {measured:{widths[2]}}  {verdict}")
    lines.insert(1, "-" * len(lines[0]))
    lines.append(f"in {result['seconds']:.0f} s: " + ("all of it holds" if result["ok"] else "NOT all of it holds"))
    return "\n".join(lines)


def _soak(found: Mapping[str, Any]) -> list[Row]:
    compared = f"{found['whole_texts_compared']} whole, {found['beginnings_compared']} beginnings"
    wrong = f"{found['wrong_count']} of {found['requests']}; compared {compared}"
    drift = found["memory_drift"]
    flat = drift < 0.05 if found["drift_counts"] else None
    return [
        ("lost or wrong texts, wrong codes", "0", wrong, found["wrong_count"] == 0),
        ("pages leaked", "0", str(found["pages_leaked"]), found["pages_leaked"] == 0),
        ("growth of memory after warm-up", "< 5 %", f"{drift:.1%} of {found['memory_mb']} MB", flat),
    ]


def _kills(found: Mapping[str, Any]) -> list[Row]:
    cold, median, slowest = found["cold_start_s"], found["median_return_s"], found["slowest_return_s"]
    return [
        (
            f"{found['kills']} kills: streams end with UNAVAILABLE",
            f"< {END_S:g} s",
            f"slowest {found['slowest_end_s']:.2f} s",
            found["slowest_end_s"] < END_S,
        ),
        (
            "ready again",
            f"within a cold start, {cold:g} s (median + {USUAL - 1:.0%})",
            f"median {median:g} s, slowest {slowest:g} s",
            median <= USUAL * cold and slowest <= LATE * cold,
        ),
        (
            "codes and later texts right",
            "all",
            f"{len(found['wrong'])} wrong; {found['texts_compared']} texts compared",
            not found["wrong"],
        ),
    ]


def _drain(found: Mapping[str, Any]) -> list[Row]:
    measured = f"{found['lost']} lost, {found['still_running']} still ran; a late one: {found['late']}"
    return [(f"drain under {found['streams']} streams", "0 lost, late ones UNAVAILABLE", measured, found["ok"])]


def _overload(found: Mapping[str, Any]) -> list[Row]:
    usual, above = found["at_capacity"], found[f"at_{FACTOR}_times"]
    ratio, refusal_s = found["admitted_p99_ratio"], found["server_side_refused_p99_s"]
    p99s = f"{above['server_side_admitted_p99_s']:g} of {usual['server_side_admitted_p99_s']:g} s by the server's clock"
    return [
        (
            f"overload {FACTOR} ×: p99 of admitted ÷ at capacity",
            f"<= {MAX_RATIO:g} ×",
            f"{ratio:.2f} × ({p99s}; {above['admitted']} admitted)",
            ratio <= MAX_RATIO,
        ),
        (
            "refused, server-side p99",
            f"< {MAX_REFUSAL_S * 1e3:g} ms",
            f"{refusal_s * 1e3:.1f} ms, {above['refused']} refused",
            refusal_s < MAX_REFUSAL_S and above["refused"] > 0,
        ),
        ("anything else wrong under overload", "0", str(len(found["wrong"])), not found["wrong"]),
    ]
