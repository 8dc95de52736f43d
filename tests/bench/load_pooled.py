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

from tests.bench.load_report import AUTO, interval
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
        ValueError: there is no dspark-auto, nothing else, or one has more repeats.
    """
    others = [arm for arm in repeats if arm != AUTO]
    if AUTO not in repeats or not others:
        raise ValueError(f"nothing to compare with {AUTO} or no such arm: {', '.join(repeats) or 'no arms'}")
    if len({len(each) for each in repeats.values()}) > 1:
        raise ValueError("its arms have not as many repeats each: they were not measured together")
    ratios = np.array(repeats[AUTO]) / np.array([repeats[arm] for arm in others])
    medians = np.median(ratios, axis=1)
    bounds = [round(bound, 4) for bound in interval(ratios, lambda medians: medians.min(axis=0))]
    best = int(medians.argmin())
    return {"best": others[best], "ratio": float(medians[best]), "interval": bounds, "repeats": ratios.shape[1]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads, and says."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load_pooled", description=__doc__)
    parser.add_argument("sweeps", type=points, nargs="+", metavar="POINTS.jsonl", help="of bench-load")
    for concurrency, repeats in pooled(parser.parse_args(arguments).sweeps).items():
        try:
            found = beside_best(repeats)
        except ValueError as error:
            parser.error(f"at {concurrency} at once: {error}")
        emit(concurrency=concurrency, **found)


def points(text: str) -> list[dict[str, Any]]:
    """The lines of a file, of a flag."""
    try:
        lines = [json.loads(line) for line in Path(text).read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["arm"], line["concurrency"], line["tokens_per_s_repeats"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text} holds no lines of `make bench-load` ({error!r})") from error
    return lines


if __name__ == "__main__":
    main()
