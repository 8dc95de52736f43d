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
    text = f"Temperature {wish.temperature:g}, {wish.verification.value} verification, whole blocks verified, "
    text += f"{wish.tokens} tokens a text; accepted length counts the bonus token.\n\n## Accepted length\n\n"
    text += length_table(report)
    text += "\n## Acceptance at each position, given all before it\n\n" + acceptance_table(report)
    table = reliability_table(report)
    text += "\n## Calibration error of prefix survival, %, 20 equal bins\n\n" + table if table else ""
    table = threshold_table(report)
    return text + ("\n## Thresholds\n\n" + table if table else "")


def length_table(report: dict[str, Any]) -> str:
    """Accepted length by domain."""
    domains = [name for name in next(iter(report.values())) if name != "macro"]
    text = head(["drafter", *domains, "macro", "rounds"])
    for name, entry in report.items():
        lengths = [number(entry[domain]["accepted_length"]) for domain in domains]
        macro = entry["macro"]
        text += row([name, *lengths, number(macro["accepted_length"]), f"{macro['rounds']:,}"])
    return text


def acceptance_table(report: dict[str, Any]) -> str:
    """Conditional acceptance by position, all domains together."""
    block = _longest(report)
    text = head(["drafter", *map(str, range(1, block + 1))])
    for name, entry in report.items():
        shares = entry["macro"]["acceptance_by_position"]
        text += row([name, *[number(share) for share in shares + [None] * (block - len(shares))]])
    return text


def reliability_table(report: dict[str, Any]) -> str:
    """Calibration error of survival by position, raw and calibrated; empty without a confidence head."""
    lines, block = "", _longest(report)
    for name, entry in report.items():
        for kind, found in entry["macro"].get("confidence", {}).items():
            errors = [f"{100 * error:.1f}" for error in found["ece"]]
            summary = [
                f"{100 * found['ece_mean']:.2f}",
                f"{100 * found['ece_worst']:.2f}",
                number(found["auc_mean"], 3),
                f"{found['rounds']:,}",
            ]
            lines += row([f"{name}, {kind}", *errors, *["—"] * (block - len(errors)), *summary])
    titles = ["confidence", *map(str, range(1, block + 1)), "mean", "worst", "AUC", "rounds"]
    return head(titles) + lines if lines else ""


def threshold_table(report: dict[str, Any]) -> str:
    """What a confidence threshold saves and costs; empty without a confidence head."""
    lines = ""
    for name, entry in report.items():
        for step in entry["macro"].get("threshold_sweep", [])[::4]:
            cells = [number(step[key]) for key in ("threshold", "accepted_length", "verified", "kept_share")]
            lines += row([name, *cells])
    titles = ["drafter", "verify while confidence ≥", "accepted length", "verified a round", "of them kept"]
    return head(titles) + lines if lines else ""


def _longest(report: dict[str, Any]) -> int:
    return max(len(entry["macro"]["acceptance_by_position"]) for entry in report.values())
