"""From logits to the distribution that is sampled: temperature, then top-k, then top-p, then min-p.

Order and meaning are Hugging Face's, except at ties: exactly k tokens survive top-k, the lowest index first. Rows are
centred at their maximum before the division, (logits − max) / temperature: the same distribution, but logsumexp
stays within [0, log V], so that exp(logits − log_z) is precise at any temperature.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kernels.device import on_gpu
from kernels.jit import entry, native
from kernels.reference import filters as reference
from kernels.select import SHORT, keep, shortlist
from kernels.vector import exp_float32, exp_row, relaxed, row_maximum


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """How each of N rows samples; tensors of length N on the logits' device."""

    temperature: torch.Tensor  # float32; 0 means greedy
    top_k: torch.Tensor  # int64; 0 means off
    top_p: torch.Tensor  # float32; 1 means off
    min_p: torch.Tensor  # float32; 0 means off
    seed: torch.Tensor  # int64: the 64 bits of the request's seed
    coupled: torch.Tensor  # bool: noise shared by draft and target; else rejection

    @classmethod
    def build(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seed: Sequence[int],
        coupled: Sequence[bool],
        device: torch.device | str = "cpu",
    ) -> SamplingRows:
        """From plain numbers; a seed is any integer, its low 64 bits count."""
        columns = (
            array("f", temperature),
            array("q", top_k),
            array("f", top_p),
            array("f", min_p),
            array("q", [(number + _SIGN) % _WORDS - _SIGN for number in seed]),
            array("b", coupled),
        )
        rejection = any(t > 0 and not shared for t, shared in zip(temperature, coupled, strict=True))
        if str(device) == "cpu":
            return cls._on_host(columns, rejection)
        filtered = any(k > 0 or p < 1 or least > 0 for k, p, least in zip(top_k, top_p, min_p, strict=True))
        rows = cls(*(torch.from_numpy(_column(column)).to(device) for column in columns))
        # Known here, so that nobody has to wait for a device to tell.
        vars(rows)["any_filter"], vars(rows)["any_rejection"] = filtered, rejection
        return rows

    @classmethod
    def _on_host(cls, columns: tuple[array[Any], ...], rejection: bool) -> SamplingRows:
        """Rows whose tensors are made when somebody asks: native code wants their addresses alone, and requests come
        and go every few rounds."""
        rows = object.__new__(cls)
        addresses = tuple([column.buffer_info()[0] for column in columns])
        vars(rows).update(_columns=columns, addresses=addresses, any_rejection=rejection)
        return rows

    def __getattr__(self, name: str) -> torch.Tensor:
        columns = vars(self).get("_columns")
        if columns is None or name not in _NAMES:
            raise AttributeError(name)
        values = vars(self)[name] = torch.from_numpy(_column(columns[_NAMES.index(name)]))
        return values

    def __len__(self) -> int:
        columns = vars(self).get("_columns")
        return len(self.temperature if columns is None else columns[0])

    def take(self, index: torch.Tensor) -> SamplingRows:
        """The rows at `index` int64 [M], repeats allowed."""
        return SamplingRows(*(getattr(self, field.name)[index] for field in fields(self)))

    @cached_property
    def filters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Temperature, top_k, top_p and min_p as NumPy arrays, for the CPU kernels."""
        return self.temperature.numpy(), self.top_k.numpy(), self.top_p.numpy(), self.min_p.numpy()

    @cached_property
    def noise(self) -> tuple[np.ndarray, np.ndarray]:
        """Seed and coupled as NumPy arrays, for the CPU kernels."""
        return self.seed.numpy(), self.coupled.numpy()

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of the six columns, for native code.

        Raises:
            ValueError: a column has another dtype than promised, or gaps.
        """
        columns = tuple(getattr(self, field.name) for field in fields(self))
        dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.bool)
        for column, dtype, field in zip(columns, dtypes, fields(self), strict=True):
            if column.dtype != dtype or not column.is_contiguous() or len(column) != len(self):
                raise ValueError(f"{field.name} must be contiguous {dtype}, one a row")
        return tuple(column.data_ptr() for column in columns)

    @cached_property
    def any_filter(self) -> bool:
        return bool(((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)).any())

    @cached_property
    def any_rejection(self) -> bool:
        """Whether a row is sampled and verified by rejection, which needs the draft's distribution."""
        return bool(((self.temperature > 0) & ~self.coupled).any())


_NAMES = tuple(field.name for field in fields(SamplingRows))
_SIGN, _WORDS = 1 << 63, 1 << 64


def _column(values: array[Any]) -> np.ndarray:
    found = np.asarray(values)
    return found.view(np.bool_) if values.typecode == "b" else found


def filter_logits_(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Turn logits [N, V] float32, in place, into log-probabilities up to a constant; return log_z [N] float32.

    A sampled row becomes (logits − max) / temperature with −inf where a filter removed the token, and
    p = exp(logits − log_z). Greedy rows (temperature 0) stay untouched. A row with NaN, or all −inf, gets log_z NaN.
    """
    if on_gpu(logits) and logits.dtype == torch.float32 and logits.stride(-1) == 1:
        from kernels.triton import filters as device

        return device.filter_logits_(logits, rows)
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.stride(-1) != 1:
        return reference.filter_logits_(logits, rows)
    log_z = np.empty(len(logits), np.float32)
    _filter_rows(logits.numpy(), *rows.filters, log_z)
    return torch.from_numpy(log_z)


_TINY = 1e-300  # the most likely token always stays
_MINUS_INFINITY = np.float32(-np.inf)


@native
def scale_row(row: np.ndarray, temperature: np.float32) -> bool:
    """row = (row − max) / temperature in place; False, and nothing done, if the row has NaN, +inf or only −inf."""
    top = row_maximum(row)
    if not np.isfinite(top):
        return False
    for v in range(row.shape[0]):
        row[v] = (row[v] - top) / temperature
    return True


@native
def filter_row(
    row: np.ndarray, weights: np.ndarray, top_k: int, top_p: np.float32, min_p: np.float32, need_weights: bool
) -> float:
    """Filter a scaled row in place. If `need_weights`, weights = exp(row) and their float64 sum is returned."""
    if 0 < top_k <= SHORT and top_k < row.shape[0]:
        return _filter_short(row, weights, top_k, top_p, min_p, need_weights)
    total = 0.0
    if top_k > 0 and top_k < row.shape[0]:
        keep(row, weights, False, np.float64(top_k))
    if top_p < 1.0:
        total = exp_row(row, weights)
        keep(row, weights, True, max(np.float64(top_p) * total, _TINY))
    if min_p > 0.0:
        floor = np.float32(np.log(min_p))
        for v in range(row.shape[0]):
            row[v] = row[v] if row[v] >= floor else _MINUS_INFINITY
    return exp_row(row, weights) if need_weights else 0.0


@native
def _filter_short(
    row: np.ndarray, weights: np.ndarray, top_k: int, top_p: np.float32, min_p: np.float32, need_weights: bool
) -> float:
    """`filter_row` for a small top-k: the other filters look at nothing but the k tokens left."""
    values, tokens = np.empty(top_k, np.float32), np.empty(top_k, np.int64)
    shortlist(row, values, tokens)
    total = 0.0
    for j in range(top_k):
        total += np.float64(exp_float32(values[j]))
    limit = max(np.float64(top_p) * total, _TINY) if top_p < 1.0 else np.inf
    floor = np.float32(np.log(min_p)) if min_p > 0.0 else _MINUS_INFINITY
    row[:] = _MINUS_INFINITY
    if need_weights:
        weights[:] = 0.0
    before = 0.0
    for j in range(top_k):
        if before >= limit or not values[j] >= floor or values[j] == _MINUS_INFINITY:
            break
        weight = exp_float32(values[j])
        row[tokens[j]] = values[j]
        if need_weights:
            weights[tokens[j]] = weight
        before += np.float64(weight)
    return before


@entry
def _filter_rows(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    log_z: np.ndarray,
) -> None:
    weights = np.empty(logits.shape[1], np.float32)
    for i in range(logits.shape[0]):
        row = logits[i]
        if temperature[i] > 0:
            if scale_row(row, temperature[i]):
                log_z[i] = np.log(filter_row(row, weights, top_k[i], top_p[i], min_p[i], True))
            else:
                log_z[i] = np.nan
        else:
            top = row_maximum(row)
            log_z[i] = top + np.log(_greedy_total(row, top))


@relaxed
def _greedy_total(row: np.ndarray, top: np.float32) -> float:
    total = 0.0
    for v in range(row.shape[0]):
        total += np.float64(exp_float32(row[v] - top))
    return total
