"""The paper's two figures of serving, as PNG. Needs matplotlib (requirements/train.txt)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bench.load_report import Point

COLOURS = {
    "plain": "#555555",
    "mtp1": "#c27c0e",
    "dflash": "#7a5195",
    "eagle3": "#ef5675",
    "dspark-fixed-3": "#9ecae1",
    "dspark-fixed-7": "#6baed6",
    "dspark-threshold": "#3182bd",
    "dspark-auto": "#1a7f37",
}


def matplotlib_missing() -> str:
    """What to do about it; nothing when it is there."""
    if find_spec("matplotlib") is not None:
        return ""
    return "the figures need matplotlib: .venv/bin/python -m pip install -r requirements/train.txt, or pass --no-plots"


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes pareto.png and load.png into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for name, figure in (("pareto", _pareto(points)), ("load", _load(points))):
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=150, bbox_inches="tight")
    return made


def _pareto(points: Sequence[Point]) -> Any:
    """Throughput against tokens/s per user, a curve an arm, each point marked with its concurrency."""
    figure, (axes,) = _figure(7, 5, 1)
    for arm, own in _arms(points):
        x, y = [p.tokens_per_s_per_user_p50 for p in own], [p.tokens_per_s for p in own]
        axes.plot(x, y, label=arm, **_style(arm))
        if arm == "dspark-auto" or len(_arms(points)) == 1:
            for point, at in zip(own, zip(x, y, strict=True), strict=True):
                axes.annotate(str(point.concurrency), at, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel="tokens/s per user (median)", ylabel="tokens/s, all users", xscale="log", yscale="log")
    _log_ticks(axes.xaxis, axes.yaxis)
    axes.set_title("Throughput against speed per user; numbers are requests at once")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _load(points: Sequence[Point]) -> Any:
    """Throughput, beside plain decoding where there is such an arm, and the verify budget, against concurrency."""
    figure, (above, below) = _figure(7, 8, 2)
    plain = {p.concurrency: p.tokens_per_s for p in points if p.arm == "plain"}
    for arm, own in _arms(points):
        shown = [p for p in own if not plain or p.concurrency in plain]
        scale = [plain.get(p.concurrency, 1.0) for p in shown]
        x, y = [p.concurrency for p in shown], [p.tokens_per_s / s for p, s in zip(shown, scale, strict=True)]
        low = [v - p.tokens_per_s_interval[0] / s for v, p, s in zip(y, shown, scale, strict=True)]
        high = [p.tokens_per_s_interval[1] / s - v for v, p, s in zip(y, shown, scale, strict=True)]
        spread = [[max(e, 0.0) for e in low], [max(e, 0.0) for e in high]]
        above.errorbar(x, y, yerr=spread, capsize=2, label=arm, **_style(arm))
        if arm != "plain":
            below.plot([p.concurrency for p in own], [p.mean_verify_budget for p in own], label=arm, **_style(arm))
    above.set(ylabel="tokens/s ÷ plain decoding" if plain else "tokens/s", title="Throughput, 95 % intervals")
    below.set(ylabel="draft tokens verified a round", title="Verify budget of a request", ylim=(0, None))
    for axes in (above, below):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({p.concurrency for p in points}))
        _plain_ticks(axes.xaxis)
        axes.set_xlabel("requests at once")
        axes.grid(alpha=0.3)
    above.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the curves, not on them
    return figure


def _figure(width: float, height: float, rows: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _plain_ticks(*axes: Any) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    for axis in axes:
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _log_ticks(*axes: Any) -> None:
    """Several a decade: a whole axis may lie between 1,000 and 5,000."""
    from matplotlib.ticker import LogLocator

    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
        axis.set_minor_locator(LogLocator(subs=()))
    _plain_ticks(*axes)


def _arms(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    names = dict.fromkeys(p.arm for p in points)
    return [(name, sorted((p for p in points if p.arm == name), key=lambda p: p.concurrency)) for name in names]


def _style(arm: str) -> dict[str, Any]:
    ours = arm == "dspark-auto"
    return {"color": COLOURS.get(arm), "marker": "o", "markersize": 5, "linewidth": 2.4 if ours else 1.4}
