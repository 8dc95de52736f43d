"""Do these counts follow this law? χ² with pooled cells, and total variation beside what chance alone gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

LEAST_EXPECTED = 5.0  # a χ² cell holds at least this many expected samples


@dataclass(frozen=True)
class Fit:
    """How well counts fit a law."""

    samples: int
    p_value: float  # of χ²; 0 when something impossible was seen
    cells: int
    variation: float  # total variation between the empirical and the exact law
    floor: float  # expected total variation of as many exact samples


def fit(counts: np.ndarray, law: np.ndarray, seed: int = 0, simulations: int = 200) -> Fit:
    """Compare counts [P, C] with laws [P, C], one a prompt; the samples of a prompt are a multinomial draw."""
    statistic, freedom, cells = 0.0, 0, 0
    for seen, expected in zip(counts, law * counts.sum(-1, keepdims=True), strict=True):
        if seen[expected == 0].any():
            statistic = np.inf
        seen, expected = _pool(seen, expected)
        statistic += float(((seen - expected) ** 2 / expected).sum())
        freedom += len(seen) - 1
        cells += len(seen)
    generator = np.random.default_rng(seed)
    totals = counts.sum(-1)
    floors = [
        _variation(np.stack([generator.multinomial(n, p / p.sum()) for n, p in zip(totals, law, strict=True)]), law)
        for _ in range(simulations)
    ]
    p_value = float(chi2.sf(statistic, freedom)) if freedom else 1.0
    return Fit(int(totals.sum()), p_value, cells, _variation(counts, law), float(np.mean(floors)))


def _pool(seen: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge cells, rarest first, until each holds LEAST_EXPECTED; what is left over joins the last one."""
    order = np.argsort(expected, kind="stable")
    ends, total = [], 0.0
    for index in order.tolist():
        total += expected[index]
        ends.append(total >= LEAST_EXPECTED)
        if ends[-1]:
            total = 0.0
    # A short group can only be at the end, where it joins the group before it.
    group = np.concatenate([[0], np.cumsum(ends)[:-1]])
    group = np.minimum(group, max(int(np.sum(ends)) - 1, 0))
    count = int(group.max()) + 1
    return (
        np.bincount(group, weights=seen[order], minlength=count),
        np.bincount(group, weights=expected[order], minlength=count),
    )


def _variation(counts: np.ndarray, law: np.ndarray) -> float:
    """½ Σ |empirical − exact|, prompts weighted by their samples."""
    totals = counts.sum(-1, keepdims=True)
    return float(0.5 * np.abs(counts - law * totals).sum() / totals.sum())
