"""An evaluation as a Markdown page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.training.evaluate import Wish


def row(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |\n"


def head(cells: list[str]) -> str:
    """A table's first two lines."""
    return row(cells) + "|" + "---|" * len(cells) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "—" if value is None else f"{value:.{digits}f}"


def markdown(report: dict[str, Any], wish: Wish) -> str:
    """Accepted length by domain, conditional acceptance by position, reliability, thresholds."""
    domains = [name for name in next(iter(report.values())) if name != "macro"]
    verified = wish.verification.value
    text = f"Temperature {wish.temperature:g}, {verified} verification, whole blocks verified, {wish.tokens} tokens a "
    text += "text; accepted length counts the bonus token.\n\n## Accepted length\n\n"
    text += head(["drafter", *domains, "macro", "rounds"])
    for name, entry in report.items():
        lengths = [number(entry[domain]["accepted_length"]) for domain in domains]
        macro = entry["macro"]
        text += row([name, *lengths, number(macro["accepted_length"]), f"{macro['rounds']:,}"])
    block = max(len(entry["macro"]["acceptance_by_position"]) for entry in report.values())
    text += "\n## Acceptance at each position, given all before it\n\n"
    text += head(["drafter", *map(str, range(1, block + 1))])
    for name, entry in report.items():
        shares = entry["macro"]["acceptance_by_position"]
        text += row([name, *[number(share) for share in shares + [None] * (block - len(shares))]])
    text += _reliability(report, block) + _thresholds(report)
    return text


def _reliability(report: dict[str, Any], block: int) -> str:
    lines = ""
    for name, entry in report.items():
        for kind, found in entry["macro"].get("confidence", {}).items():
            errors = [f"{100 * error:.1f}" for error in found["ece"]]
            summary = [
                f"{100 * found['ece_mean']:.2f}",
                f"{100 * found['ece_worst']:.2f}",
                number(found["auc_mean"], 3),
            ]
            lines += row([f"{name}, {kind}", *errors, *["—"] * (block - len(errors)), *summary])
    if not lines:
        return ""
    titles = ["confidence", *map(str, range(1, block + 1)), "mean", "worst", "AUC"]
    return "\n## Calibration error of prefix survival, %, 20 equal bins\n\n" + head(titles) + lines


def _thresholds(report: dict[str, Any]) -> str:
    lines = ""
    for name, entry in report.items():
        for step in entry["macro"].get("threshold_sweep", [])[::4]:
            cells = [number(step[key]) for key in ("threshold", "accepted_length", "verified", "kept_share")]
            lines += row([name, *cells])
    if not lines:
        return ""
    titles = ["drafter", "verify while confidence ≥", "accepted length", "verified a round", "of them kept"]
    return "\n## Thresholds\n\n" + head(titles) + lines
