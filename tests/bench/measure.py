"""Interleaved timing and JSON lines; knows nothing of what is timed."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "engine" / "demo"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(**record: Any) -> None:
    """One JSON line on stdout."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    print(json.dumps(rounded), flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleave(arms: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every arm once a repeat, in alternating order, and collect what each returns."""
    results: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        names = list(arms) if repeat % 2 == 0 else list(reversed(arms))
        for name in names:
            results[name].append(arms[name]())
    return results


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def repeated_share(tokens: Sequence[int], width: int = 16) -> float:
    """Share of a text's `width`-grams that stood in it before: how much of it is a loop."""
    seen: set[tuple[int, ...]] = set()
    repeated = total = 0
    for start in range(len(tokens) - width + 1):
        gram = tuple(tokens[start : start + width])
        repeated += gram in seen
        seen.add(gram)
        total += 1
    return repeated / total if total else 0.0


def heldout(domain: str) -> list[str]:
    """Held-out prompts of one domain."""
    lines = (DEMO / "prompts" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["prompt"] for entry in map(json.loads, lines) if entry["domain"] == domain]
