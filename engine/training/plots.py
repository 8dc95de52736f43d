"""Pictures of an evaluation: the paper's Figures 2 to 6. Needs matplotlib (requirements/train.txt)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.training.settings import SettingsError

Report = dict[str, Any]
FEWEST = 20  # rounds that a point of a reliability diagram stands for


Curve = dict[str, list[tuple[float, float]]]


def draw(report: Report, folder: Path, depth: list[Report] | None = None, curve: Curve | None = None) -> list[Path]:
    """Every picture that the report has figures for.

    Args:
        depth: points {line, layers, accepted_length} of a sweep over layers; None takes the report's own drafters.
        curve: points (training steps, accepted length) by drafter.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SettingsError(
            "plots need matplotlib: pip install -r requirements/train.txt, or leave --plots out"
        ) from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Report], Any]] = {
        "acceptance": _acceptance,
        "lengths": _lengths,
        "blocks": _blocks,
        "depth": lambda report: _depth(report, _own_depths(report) if depth is None else depth),
        "thresholds": _thresholds,
        "reliability": _reliability,
        "curve": lambda report: _curve(report, curve or {}),
    }
    made = []
    for name, make in makers.items():
        figure = make(report)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            made.append(path)
    return made


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def _colour(report: Report, name: str) -> str:
    """The same for a drafter in every picture."""
    names = list(report)
    return f"C{names.index(name)}" if name in names else f"C{len(names) + sum(map(ord, name)) % 3}"


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes: it must hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)


def _acceptance(report: Report) -> Any:
    """Figure 2: acceptance at each position given all before it."""
    figure, axes = _figure(6, 4)
    for name, entry in report.items():
        shares = entry["macro"]["acceptance_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name, color=_colour(report, name))
    axes.set(xlabel="position in the block", ylabel="accepted, given all before it", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _lengths(report: Report) -> Any:
    """Accepted length by domain."""
    domains = [name for name in next(iter(report.values())) if name != "macro"] + ["macro"]
    figure, axes = _figure(len(domains) * max(1.6, 0.36 * len(report)), 4)
    width = 0.8 / len(report)
    for index, (name, entry) in enumerate(report.items()):
        places = [i + (index - (len(report) - 1) / 2) * width for i in range(len(domains))]
        bars = axes.bar(places, [entry[d]["accepted_length"] for d in domains], width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(domains)), domains)
    axes.set(ylabel="accepted length, bonus token included")
    axes.margins(y=0.12)
    _legend(figure, axes)
    return figure


def _blocks(report: Report) -> Any:
    """Figure 4: accepted length by block size."""
    figure, axes = _figure(6, 4)
    for name, entry in report.items():
        sweep = entry["macro"]["block_sweep"]
        sizes, lengths = zip(*((s["block_size"], s["accepted_length"]) for s in sweep), strict=True)
        axes.plot(sizes, lengths, marker="o", label=name, color=_colour(report, name))
    axes.set(xlabel="tokens drafted and verified a round", ylabel="accepted length")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _own_depths(report: Report) -> list[Report]:
    """One line a head."""
    found = []
    for entry in report.values():
        macro = entry["macro"]
        if macro.get("layers"):
            line = "no head (DFlash)" if macro["head"] == "none" else f"{macro['head']} head"
            found.append({"line": line, "layers": macro["layers"], "accepted_length": macro["accepted_length"]})
    return found


def _depth(report: Report, points: list[Report]) -> Any:
    """Figure 3: accepted length by layers; needs two depths of a line."""
    lines: dict[str, dict[int, float]] = {}
    for point in points:
        lines.setdefault(point["line"], {})[point["layers"]] = point["accepted_length"]
    lines = {line: found for line, found in lines.items() if len(found) > 1}
    if not lines:
        return None
    figure, axes = _figure(6, 4)
    for line, found in lines.items():
        lengths = [found[layers] for layers in sorted(found)]
        axes.plot(sorted(found), lengths, marker="o", label=line, color=_colour(report, line))
    axes.set(xlabel="draft layers", ylabel="accepted length, macro-average")
    axes.set_xticks(sorted({layers for found in lines.values() for layers in found}))
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _curve(report: Report, lines: Curve) -> Any:
    """Accepted length by training budget."""
    if not lines:
        return None
    figure, axes = _figure(6, 4)
    for name, points in lines.items():
        steps, lengths = zip(*points, strict=True)
        axes.plot(steps, lengths, marker="o", label=name, color=_colour(report, name))
    axes.set(xlabel="training steps", ylabel="accepted length, macro-average", xlim=(0, None))
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _thresholds(report: Report) -> Any:
    """Figure 5: what a confidence threshold saves and costs."""
    found = {name: e["macro"]["threshold_sweep"] for name, e in report.items() if "threshold_sweep" in e["macro"]}
    if not found:
        return None
    figure, (left, right) = _figure(10, 4, ncols=2)
    for name, sweep in found.items():
        verified = [s["verified"] for s in sweep]
        colour = _colour(report, name)
        left.plot(verified, [s["accepted_length"] for s in sweep], marker=".", label=name, color=colour)
        right.plot([s["threshold"] for s in sweep], [s["kept_share"] for s in sweep], marker=".", color=colour)
    left.set(xlabel="draft tokens verified a round", ylabel="accepted length")
    right.set(xlabel="verify while confidence ≥", ylabel="share of verified tokens that are kept", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _legend(figure, left)
    return figure


def _reliability(report: Report) -> Any:
    """Figure 6: predicted and observed prefix survival, raw and calibrated, one panel a position; bins of few
    rounds are left out."""
    found = {name: e["macro"]["confidence"] for name, e in report.items() if "confidence" in e["macro"]}
    if not found:
        return None
    kinds = next(iter(found.values()))
    block = len(kinds["raw"]["ece"])
    figure, grid = _figure(
        2.4 * block, 2.6 * len(found), nrows=len(found), ncols=block, squeeze=False, sharex=True, sharey=True
    )
    for axes_row, (name, kinds) in zip(grid, found.items(), strict=True):
        for k, axes in enumerate(axes_row[: len(kinds["raw"]["ece"])]):
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
            for kind, colour in (("raw", "tab:orange"), ("calibrated", "tab:blue")):
                if kind in kinds:
                    points = [p for p in kinds[kind]["diagram"][k] if p[2] >= FEWEST]
                    label = f"{kind}, ECE {100 * kinds[kind]['ece'][k]:.1f} %"
                    axes.plot([p[0] for p in points], [p[1] for p in points], marker=".", color=colour, label=label)
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), title=f"position {k + 1}", aspect="equal")
            axes.legend(fontsize=6, loc="upper left")
        axes_row[0].set_ylabel(f"{name}\nsurvived")
    for axes in grid[-1]:
        axes.set_xlabel("predicted")
    return figure
