"""A comparison as a Markdown page with its figures and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.training.evaluate import write_whole
from engine.training.report import acceptance_table, head, length_table, number, reliability_table, row, threshold_table
from engine.training.settings import SettingsError

Report = dict[str, Any]
PICTURES = {
    "lengths": "Accepted length by domain",
    "acceptance": "Acceptance at each position of the block, given all before it",
    "curve": "Accepted length by training budget",
    "depth": "Accepted length by draft layers",
    "blocks": "Accepted length by tokens verified a round",
    "thresholds": "What a confidence threshold saves and costs",
    "reliability": "Predicted and observed survival, before and after calibration",
}


def write_report(report: Report, out: Path) -> Path:
    """report.json, report.md and, where matplotlib is installed, PNG plots; returns the page."""
    from engine.training.plots import draw

    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.json", json.dumps(report, indent=1) + "\n")
    first = f"{report['temperatures'][0]:g}"
    try:
        drawn = {path.stem for path in draw(report["results"][first], out, report["depth"], budget_curve(report))}
        missing = ""
    except SettingsError as error:
        drawn, missing = set(), str(error)
    write_whole(out / "report.md", page(report, drawn, missing))
    return out / "report.md"


def budget_curve(report: Report) -> dict[str, list[tuple[float, float]]]:
    """(steps, or percent of the budget where that was no count; macro accepted length) by arm."""
    lines = {}
    for name, points in report["curve"].items():
        unit = report["arms"][name]["steps"] or 100
        lines[name] = [(point["share"] * unit, point["accepted_length"]["macro"]) for point in points]
    return {name: points for name, points in lines.items() if len(points) > 1}


def page(report: Report, drawn: set[str], missing: str = "") -> str:
    """The Markdown page."""
    settings, first = report["settings"], f"{report['temperatures'][0]:g}"
    shown = report["results"][first]
    text = "# Drafters compared\n\nMade by `python -m engine.training compare`; report.json holds every figure.\n\n"
    text += (
        f"Target {settings['target']}; prompts {settings['prompts']}; {settings['tokens']} tokens a text, rejection "
    )
    text += "verification, whole blocks verified. Accepted length counts the target's own token.\n\n## The drafters\n\n"
    text += _arms(report)
    for temperature, entries in report["results"].items():
        text += f"\n## Temperature {temperature}\n\n"
        text += length_table(entries) + "\n" + _ahead(entries)
        text += "\nAcceptance at each position, given all before it:\n\n" + acceptance_table(entries)
        table = reliability_table(entries)
        if table:
            text += "\nCalibration error of prefix survival in % (20 equal bins), by position:\n\n" + table
    text += _curve(report) + _depth(report)
    table = threshold_table(shown)
    if table:
        text += f"\n## Thresholds, temperature {first}\n\n" + table
    pictures = [f"\n![{title}]({name}.png)\n" for name, title in PICTURES.items() if name in drawn]
    if pictures:
        text += f"\n## Plots, temperature {first}\n" + "".join(pictures)
    return text + (f"\nNo plots: {missing}\n" if missing else "")


def _arms(report: Report) -> str:
    text = head(["drafter", "layers", "block", "weights", "loss", "steps"])
    for facts in report["arms"].values():
        cells = [facts["title"], str(facts["layers"]), str(facts["block_size"] or 1)]
        cells += [f"{facts['parameters'] / 1e6:.2f} M", facts["loss"] or "—", str(facts["steps"] or "—")]
        text += row(cells)
    if any(facts["steps"] is None for facts in report["arms"].values()):
        text += "\nDrafters without steps were taken as they are.\n"
    if report["differences"]:
        return text + "\nNot the same in all runs: " + "; ".join(report["differences"]) + ".\n"
    return text + "\nTrained on the same data in the same order, with the same optimiser settings and budget.\n"


def _ahead(entries: dict[str, Any]) -> str:
    """How far the first drafter is ahead of each other one."""
    names = list(entries)
    if len(names) < 2:
        return ""
    domains = [name for name in entries[names[0]] if name != "macro"]
    text = head([f"{names[0]} over", *domains, "macro"])
    for name in names[1:]:
        cells = [name]
        for domain in (*domains, "macro"):
            ratio = entries[names[0]][domain]["accepted_length"] / entries[name][domain]["accepted_length"]
            cells.append(f"{100 * (ratio - 1):+.1f} %")
        text += row(cells)
    return text


def _curve(report: Report) -> str:
    lines = {name: points for name, points in report["curve"].items() if len(points) > 1}
    if not lines:
        return ""
    shares = sorted({point["share"] for points in lines.values() for point in points})
    text = "\n## Accepted length by training budget\n\n"
    text += (
        "Before the end the learning rate has not fallen: a run of that budget alone would accept a little more.\n\n"
    )
    text += head(["drafter", *(f"{100 * share:g} %" for share in shares)])
    for name, points in lines.items():
        found = {point["share"]: point["accepted_length"]["macro"] for point in points}
        text += row([name, *(number(found.get(share)) for share in shares)])
    return text


def _depth(report: Report) -> str:
    lines: dict[str, dict[int, float]] = {}
    for point in report["depth"]:
        lines.setdefault(point["line"], {})[point["layers"]] = point["accepted_length"]
    lines = {line: points for line, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    depths = sorted({layers for points in lines.values() for layers in points})
    text = "\n## Accepted length by draft layers\n\n" + head(["drafter", *map(str, depths)])
    for line, points in lines.items():
        text += row([line, *(number(points.get(layers)) for layers in depths)])
    return text
