"""How far confidences can be believed: calibration error, ranking, and what a threshold on them would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 20
Array = np.ndarray[Any, Any]


def bins(predicted: Array, happened: Array) -> list[tuple[float, float, int]]:
    """(mean prediction, share that happened, count) of each of 20 equal bins of [0, 1] that is not empty."""
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (predicted, happened.astype(float))]
    return [(float(p / c), float(h / c), int(c)) for p, h, c in zip(*sums, counts, strict=True) if c]


def ece(predicted: Array, happened: Array) -> float:
    """Expected calibration error: Σ share of a bin · |mean prediction − share that happened|."""
    if not len(predicted):
        return 0.0
    return sum(c * abs(p - h) for p, h, c in bins(predicted, happened)) / len(predicted)


def auc(predicted: Array, happened: Array) -> float | None:
    """Chance that a random accepted case is ranked above a random rejected one; None without both kinds."""
    positive = int(happened.sum())
    negative = len(happened) - positive
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # ties share their mean rank
    total = rank[inverse][happened.astype(bool)].sum()
    return float((total - positive * (positive + 1) / 2) / (positive * negative))


def reliability(confidence: Array, kept: Array, known: Array) -> dict[str, Any]:
    """Of prefix survival Π_{i≤k} c_i at each position, over the rounds whose outcome there is known.

    Args:
        confidence: conditional ones [n, γ]; kept: accepted tokens [n]; known: positions with known outcome [n].
    """
    survival = confidence.cumprod(1)
    errors, ranks, diagrams = [], [], []
    for k in range(confidence.shape[1]):
        rows = known > k
        predicted, happened = survival[rows, k], kept[rows] > k
        errors.append(round(ece(predicted, happened), 5))
        ranks.append(auc(predicted, happened))
        diagrams.append([[round(p, 4), round(h, 4), c] for p, h, c in bins(predicted, happened)])
    seen = [rank for rank in ranks if rank is not None]
    return {
        "rounds": len(kept),
        "ece": errors,
        "ece_mean": round(float(np.mean(errors)), 5),
        "ece_worst": round(max(errors), 5),
        "auc": [None if rank is None else round(rank, 4) for rank in ranks],
        "auc_mean": round(float(np.mean(seen)), 4) if seen else None,
        "diagram": diagrams,
    }


def threshold_sweep(
    confidence: Array, kept: Array, thresholds: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """Verifying while confidence is at least θ: tokens a round, drafted tokens verified, share of them kept.

    Acceptance does not depend on what is verified after it, so rounds that verified whole blocks say what any
    shorter prefix would have given.
    """
    out = []
    for theta in thresholds if thresholds is not None else [i / 20 for i in range(20)]:
        low = confidence < theta
        length = np.where(low.any(1), low.argmax(1), confidence.shape[1])
        accepted = np.minimum(kept, length)
        out.append(
            {
                "threshold": float(theta),
                "accepted_length": round(1 + float(accepted.mean()), 4),
                "verified": round(float(length.mean()), 4),
                "kept_share": round(float(accepted.sum() / max(1, length.sum())), 4),
            }
        )
    return out


def block_sweep(kept: Array, block: int) -> list[dict[str, float]]:
    """Accepted length if blocks were cut to the first 1 … γ tokens."""
    return [
        {"block_size": size, "accepted_length": round(1 + float(np.minimum(kept, size).mean()), 4)}
        for size in range(1, block + 1)
    ]
