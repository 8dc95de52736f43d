"""Turns a confidence head's raw outputs into probabilities that hold: `calibration.json`, loaded and applied.

Position k's result depends on the confidences of positions up to k alone, so admission stays non-anticipating.
Knows no fitting: `python -m engine.training calibrate` writes the file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.errors import LoadError
from engine.models.loader import read_json
from engine.types import DraftBlock, Verification

FILE = "calibration.json"
FORMAT = 1
Array = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
_EDGE = 1e-6  # confidences of exactly 0 or 1 have no logit


class Method(Protocol):
    """Conditional confidences [R, γ] in, calibrated ones out; column k reads columns up to k."""

    def apply(self, confidence: Array) -> Array: ...


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^−x), for any finite x: e^−x itself overflows below −709."""
    found: Array = np.exp(-np.logaddexp(0.0, -x))
    return found


@dataclass(frozen=True)
class Affine:
    """σ(slope_k · logit(c) + offset_k). Sequential temperature scaling has slope 1/T_k and no offset."""

    slope: Array  # [γ]
    offset: Array  # [γ]

    def apply(self, confidence: Array) -> Array:
        inner = confidence.clip(_EDGE, 1 - _EDGE)
        return sigmoid(self.slope * np.log(inner / (1.0 - inner)) + self.offset)


@dataclass(frozen=True)
class SurvivalMap:
    """A rising map of each position's survival: a'_k = min(a'_{k−1}, f_k(a'_{k−1} · c_k)), linear between knots."""

    knots: Array  # [m], from 0 to 1, the same for every position
    values: Array  # [γ, m], rising

    def apply(self, confidence: Array) -> Array:
        out = np.empty_like(confidence)
        survival = np.ones(len(confidence))
        for k in range(confidence.shape[1]):
            below = np.maximum(survival, _EDGE)
            mapped = np.minimum(np.interp(survival * confidence[:, k], self.knots, self.values[k]), survival)
            out[:, k] = mapped / below
            survival = mapped
        return out.clip(0.0, 1.0)


@dataclass(frozen=True)
class Entry:
    """A calibration and where it holds."""

    verification: Verification
    temperature: tuple[float, float]  # inclusive band
    name: str
    method: Method

    def distance(self, temperature: float) -> float:
        """How far a temperature lies outside the band."""
        low, high = self.temperature
        return max(low - temperature, temperature - high, 0.0)


class Calibration:
    """All entries of a drafter's calibration.json.

    A request takes the entry of its verification mode (either mode at temperature 0, where both are argmax
    agreement) whose temperature band is nearest; without one its confidences stay as they are.
    """

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        self._chosen: dict[tuple[Verification, float], Method | None] = {}

    def method(self, verification: Verification, temperature: float) -> Method | None:
        """The calibration for requests that sample so."""
        key = verification, temperature
        if key not in self._chosen:
            fits = [e for e in self.entries if e.verification is verification or temperature == 0.0]
            if temperature > 0.0:  # argmax agreement says nothing about sampling
                fits = [e for e in fits if e.temperature[1] > 0.0]
            best = min(fits, key=lambda e: e.distance(temperature), default=None)
            self._chosen[key] = None if best is None else best.method
        return self._chosen[key]

    def index(self, verification: Verification, temperature: float) -> int:
        """Which of `tables` holds the calibration for requests that sample so; −1 for none."""
        wanted = self.method(verification, temperature)
        return next((i for i, entry in enumerate(self.entries) if entry.method is wanted), -1)

    def tables(self, block_size: int) -> tuple[IntArray, Array, Array]:
        """All methods as arrays for `native_survival.survivals`, which applies them as `apply` does."""
        most = max((len(e.method.knots) for e in self.entries if isinstance(e.method, SurvivalMap)), default=1)
        kinds = np.zeros(len(self.entries), np.int64)
        affine = np.ones((len(self.entries), 2, block_size))
        maps = np.full((len(self.entries), 1 + block_size, most), np.inf)
        for i, entry in enumerate(self.entries):
            if isinstance(entry.method, Affine):
                kinds[i] = 1
                affine[i] = entry.method.slope, entry.method.offset
            elif isinstance(entry.method, SurvivalMap):
                kinds[i] = 2
                maps[i, 0, : len(entry.method.knots)] = entry.method.knots
                maps[i, 1:, : len(entry.method.knots)] = entry.method.values
            else:
                raise TypeError(f"calibration method {entry.name} has no native form")
        return kinds, affine, maps

    def apply(self, block: DraftBlock) -> DraftBlock:
        """The block with calibrated confidences; the block itself where nothing applies."""
        if block.confidence is None:
            return block
        wanted = [self.method(s.verification, s.request.sampling.temperature) for s in block.sequences]
        if all(method is None for method in wanted):
            return block
        raw = block.confidence.cpu().numpy().astype(np.float64)
        if all(method is wanted[0] for method in wanted):
            found = wanted[0].apply(raw) if wanted[0] is not None else raw
        else:
            found = raw.copy()
            for method in {id(m): m for m in wanted if m is not None}.values():
                rows = [i for i, other in enumerate(wanted) if other is method]
                found[rows] = method.apply(raw[rows])
        confidence = torch.from_numpy(found.astype(np.float32)).to(block.confidence.device)
        return replace(block, confidence=confidence)


def weights_hash(directory: Path) -> str:
    """SHA-256 over a checkpoint's safetensors files in the order of their names."""
    whole = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def load_calibration(directory: Path, block_size: int) -> Calibration | None:
    """The calibration beside a drafter, None when there is none.

    Raises:
        LoadError: it belongs to other weights or is damaged; names the file and the mend.
    """
    path = directory / FILE
    if not path.exists():
        return None
    table = read_json(path)
    mend = "run `python -m engine.training calibrate` again, or delete the file"
    if table.get("weights_sha256") != weights_hash(directory):
        raise LoadError(f"{path} belongs to other weights than those beside it; {mend}")
    try:
        if table["format"] != FORMAT or table["block_size"] != block_size:
            raise ValueError(f"format {table['format']}, block_size {table['block_size']}")
        return Calibration(tuple(_entry(row, block_size) for row in table["entries"]))
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"{path} is not a calibration of a drafter with block_size {block_size} ({error}); {mend}"
        ) from error


def _entry(row: dict[str, Any], block: int) -> Entry:
    low, high = (float(value) for value in row["temperature"])
    return Entry(Verification(row["verification"]), (low, high), row["method"], make_method(row, block))


def make_method(row: dict[str, Any], block: int) -> Method:
    """A method from its JSON form.

    Raises:
        ValueError, KeyError, TypeError: not one of ours.
    """
    given = row["parameters"]
    if row["method"] in ("none", "sts", "platt"):
        ones = [1.0] * block
        slope = [1.0 / t for t in given["temperatures"]] if row["method"] == "sts" else given.get("slope", ones)
        affine = Affine(_array(slope, block), _array(given.get("offset", [0.0] * block), block))
        if (affine.slope <= 0).any():
            raise ValueError("slopes must be positive: more confidence must never mean less")
        return affine
    if row["method"] == "survival_map":
        knots = np.asarray(given["knots"], dtype=np.float64)
        values = np.asarray(given["values"], dtype=np.float64)
        if values.shape != (block, len(knots)) or (np.diff(knots) <= 0).any() or (np.diff(values) < 0).any():
            raise ValueError("knots and values must rise, one row of values a position")
        return SurvivalMap(knots, values)
    raise ValueError(f"method {row['method']!r} is unknown")


def _array(values: list[float], block: int) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (block,) or not np.isfinite(found).all():
        raise ValueError(f"needs {block} finite numbers, got {values}")
    return found


def survival(confidence: Array) -> Array:
    """Prefix survival a_k = Π_{i≤k} c_i, [R, γ] -> [R, γ]."""
    found: Array = confidence.cumprod(1)
    return found
