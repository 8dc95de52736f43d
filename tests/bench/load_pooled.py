"""`python -m tests.bench.load_pooled POINTS.jsonl …`: dspark-auto beside the best other arm, over sweeps together.

In a repeat all arms ran in turns, so that the machine's mood of that repeat cancels where two arms of it are divided.
The figure is the median of these ratios over all repeats, to the arm that it is lowest against, with a 95 % bootstrap
interval of that over repeats. One JSON line a concurrency.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.load_report import AUTO, RESAMPLES
from tests.bench.measure import emit

Repeats = dict[str, list[float]]  # by arm, in tokens/s; those of one place were measured together


def pooled(sweeps: Iterable[Sequence[dict[str, Any]]]) -> dict[int, Repeats]:
    """Repeats by concurrency, of the arms that every sweep has there.

    Args:
        sweeps: lines of points.jsonl.
    """
    found: dict[int, Repeats] = {}
    for points in sweeps:
        for concurrency in {point["concurrency"] for point in points}:
            own = {p["arm"]: p["tokens_per_s_repeats"] for p in points if p["concurrency"] == concurrency}
            before = found.get(concurrency, {arm: [] for arm in own})
            found[concurrency] = {arm: before[arm] + own[arm] for arm in before if arm in own}
    return dict(sorted(found.items()))


def beside_best(repeats: Repeats) -> dict[str, Any]:
    """dspark-auto's ratio to the arm that it does worst against.

    Raises:
        ValueError: there is no dspark-auto, or nothing else.
    """
    others = [arm for arm in repeats if arm != AUTO]
    if AUTO not in repeats or not others:
        raise ValueError(f"nothing to compare: {', '.join(repeats) or 'no arms'}")
    ratios = np.array(repeats[AUTO]) / np.array([repeats[arm] for arm in others])
    medians = np.median(ratios, axis=1)
    drawn = np.random.default_rng(0).integers(ratios.shape[1], size=(RESAMPLES, ratios.shape[1]))
    low, high = np.quantile(np.median(ratios[:, drawn], axis=2).min(axis=0), (0.025, 0.975))
    interval = [round(float(low), 4), round(float(high), 4)]
    best = int(medians.argmin())
    return {"best": others[best], "ratio": float(medians[best]), "interval": interval, "repeats": ratios.shape[1]}


def main() -> None:
    """Reads, and says."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load_pooled", description=__doc__)
    parser.add_argument("points", type=Path, nargs="+", metavar="POINTS.jsonl", help="of bench-load")
    sweeps = [[json.loads(line) for line in path.read_text().splitlines()] for path in parser.parse_args().points]
    for concurrency, repeats in pooled(sweeps).items():
        emit(concurrency=concurrency, **beside_best(repeats))


if __name__ == "__main__":
    main()
