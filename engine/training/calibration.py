"""Fits calibrations of a confidence head and chooses among them on rounds that none of them saw."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.schedule.calibrate import FILE, FORMAT, make_method, sigmoid, weights_hash
from engine.training.reliability import ece, reliability
from engine.training.settings import SettingsError
from engine.types import Verification

Array = np.ndarray[Any, Any]
GRID = np.geomspace(0.2, 5.0, 81)  # temperatures that sequential temperature scaling tries
KNOTS = np.linspace(0.0, 1.0, 33)


@dataclass(frozen=True)
class Rows:
    """Rounds: conditional confidences [n, γ], accepted tokens [n], positions with known outcome [n]."""

    confidence: Array
    kept: Array
    known: Array

    def pick(self, rows: Array) -> Rows:
        """Some of the rounds."""
        return Rows(self.confidence[rows], self.kept[rows], self.known[rows])


def logit(p: Array) -> Array:
    """ln(p / (1 − p)), finite."""
    inner = p.clip(1e-6, 1 - 1e-6)
    found: Array = np.log(inner / (1 - inner))
    return found


def fit_sts(rows: Rows) -> dict[str, Any]:
    """Sequential temperature scaling (DSpark paper, section 3.4): left to right, each position's temperature
    minimises the calibration error of the cumulative product, those before it fixed."""
    before = np.ones(len(rows.kept))
    chosen = []
    for k in range(rows.confidence.shape[1]):
        seen, inner = rows.known > k, logit(rows.confidence[:, k])
        happened = rows.kept[seen] > k
        errors = [ece(before[seen] * sigmoid(inner[seen] / t), happened) for t in GRID]
        chosen.append(float(GRID[int(np.argmin(errors))]))
        before = before * sigmoid(inner / chosen[-1])
    return {"method": "sts", "parameters": {"temperatures": chosen}}


def fit_platt(rows: Rows) -> dict[str, Any]:
    """A map of its own for each position: σ(slope·logit(c) + offset), by maximum likelihood over the rounds that
    came so far (Newton's method, weakly held to slope 1 and offset 0)."""
    slopes, offsets = [], []
    for k in range(rows.confidence.shape[1]):
        reached = (rows.known > k) & (rows.kept >= k)
        x = np.stack((logit(rows.confidence[reached, k]), np.ones(int(reached.sum()))), 1)
        y = (rows.kept[reached] > k).astype(float)
        start = np.array([1.0, 0.0])
        weights = start.copy()
        for _ in range(30):
            p = sigmoid(x @ weights)
            slope = x.T @ (y - p) - (weights - start)
            curve = (x * (p * (1 - p))[:, None]).T @ x + np.eye(2)
            weights = weights + np.linalg.solve(curve, slope)
        slopes.append(float(max(weights[0], 0.05)))
        offsets.append(float(weights[1]))
    return {"method": "platt", "parameters": {"slope": slopes, "offset": offsets}}


def rising(values: Array, weights: Array) -> Array:
    """The closest rising sequence in weighted squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, mass, length = blocks.pop()
            total = blocks[-1][1] + mass
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * mass) / total, total, blocks[-1][2] + length]
    return np.concatenate([np.full(int(length), mean) for mean, _, length in blocks])


def fit_survival_map(rows: Rows) -> dict[str, Any]:
    """A rising, piecewise linear map of each position's survival, left to right; each knot is held to the
    diagonal as if by ten rounds, so that empty regions stay as they are."""
    before = np.ones(len(rows.kept))
    table = []
    for k in range(rows.confidence.shape[1]):
        raw = before * rows.confidence[:, k]
        seen = rows.known > k
        happened = (rows.kept[seen] > k).astype(float)
        place = raw[seen] * (len(KNOTS) - 1)
        low = np.minimum(place.astype(int), len(KNOTS) - 2)
        right = place - low
        # Least squares over hat functions: a tridiagonal system.
        system = np.zeros((len(KNOTS), len(KNOTS)))
        for a, b, share in ((0, 0, (1 - right) ** 2), (1, 1, right**2), (0, 1, right * (1 - right))):
            np.add.at(system, (low + a, low + b), share)
            if a != b:
                np.add.at(system, (low + b, low + a), share)
        goal = np.bincount(low, (1 - right) * happened, len(KNOTS)) + np.bincount(low + 1, right * happened, len(KNOTS))
        found = np.linalg.solve(system + 10 * np.eye(len(KNOTS)), goal + 10 * KNOTS)
        values = rising(found, system.diagonal() + 10).clip(0.0, 1.0)
        table.append([round(float(v), 5) for v in values])
        before = np.minimum(np.interp(raw, KNOTS, np.array(table[-1])), before)
    return {"method": "survival_map", "parameters": {"knots": [round(float(k), 5) for k in KNOTS], "values": table}}


FITS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "sts": fit_sts,
    "platt": fit_platt,
    "survival_map": fit_survival_map,
}


def fit(fitting: Rows, choosing: Rows) -> dict[str, Any]:
    """The method with the smallest mean calibration error of prefix survival on `choosing`.

    Returns:
        Its JSON form, and under `measured` every method's error on `choosing`, `none` among them.

    Raises:
        SettingsError: too few rounds to say anything.
    """
    if min(len(fitting.kept), len(choosing.kept)) < 100:
        raise SettingsError(
            f"{len(fitting.kept)} + {len(choosing.kept)} rounds are too few to calibrate on; give more prompts"
        )
    block = fitting.confidence.shape[1]
    made = {"none": {"method": "none", "parameters": {}}, **{name: found(fitting) for name, found in FITS.items()}}
    measured = {}
    for name, form in made.items():
        calibrated = make_method(form, block).apply(choosing.confidence.astype(np.float64))
        found = reliability(calibrated, choosing.kept, choosing.known)
        measured[name] = {key: found[key] for key in ("ece_mean", "ece_worst", "auc_mean")}
    best = min(measured, key=lambda name: measured[name]["ece_mean"])
    rounds = {"fitting": len(fitting.kept), "choosing": len(choosing.kept)}
    return {**made[best], "measured": measured, "rounds": rounds}


def write(directory: Path, block: int, entries: list[dict[str, Any]]) -> Path:
    """calibration.json beside a drafter, whole or not at all; entries of other modes and bands stay."""
    path = directory / FILE
    digest = weights_hash(directory)
    kept = []
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            if old["weights_sha256"] == digest and old["block_size"] == block:
                fresh = {(e["verification"], tuple(e["temperature"])) for e in entries}
                kept = [e for e in old["entries"] if (e["verification"], tuple(e["temperature"])) not in fresh]
        except (OSError, ValueError, KeyError, TypeError):
            kept = []  # damaged, or of other weights: replaced
    table = {"format": FORMAT, "weights_sha256": digest, "block_size": block, "entries": [*kept, *entries]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def band(temperature: float) -> list[float]:
    """The temperatures that a fit at this one stands for."""
    return [0.0, 0.0] if temperature == 0 else [round(temperature * 0.75, 3), round(temperature * 1.25, 3)]


def entry(found: dict[str, Any], verification: Verification, temperature: float) -> dict[str, Any]:
    """A fit with where it holds."""
    return {"verification": verification.value, "temperature": band(temperature), **found}
