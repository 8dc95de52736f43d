"""Finding the tokens that top-k and top-p keep, without sorting the vocabulary. Numba helpers of `filters.py`.

Rows are centred float32 logits (the maximum is 0). Falling order means by value, then by lowest index.
"""

from __future__ import annotations

import numpy as np

from kernels.jit import native
from kernels.vector import float_bits

SHORT = 64  # the longest top-k kept as a sorted list
_LANES, _BLOCK = 256, 64
_MAGNITUDE = np.int32(0x7FFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)


@native
def shortlist(row: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> None:
    """The first k ≤ 64 tokens of a row in falling order, into values [k] and tokens [k]; k is at most the row's length.

    The maxima of 256 interleaved lanes are k different tokens' values, so their k-th largest bounds the k-th largest of
    the row from below, and only the few tokens that reach it are ever inserted.
    """
    k = values.shape[0]
    lanes = np.full(_LANES, _MINUS_INFINITY, np.float32)
    for start in range(0, row.shape[0], _LANES):
        part = row[start : start + _LANES]
        for v in range(part.shape[0]):
            lanes[v] = part[v] if part[v] > lanes[v] else lanes[v]
    values[:] = _MINUS_INFINITY
    for lane in range(_LANES):
        if lanes[lane] > values[k - 1]:
            _insert(lanes[lane], lane, values, tokens)
    bound = values[k - 1]
    values[:] = _MINUS_INFINITY
    for start in range(0, row.shape[0], _BLOCK):
        part = row[start : start + _BLOCK]
        hits = 0
        for v in range(part.shape[0]):
            hits += part[v] >= bound
        if hits:
            for v in range(part.shape[0]):
                if part[v] >= bound and part[v] > values[k - 1]:
                    _insert(part[v], start + v, values, tokens)


@native
def _insert(value: np.float32, token: int, values: np.ndarray, tokens: np.ndarray) -> None:
    """Insert before the first smaller entry; the last one falls out."""
    j = values.shape[0] - 1
    while j > 0 and values[j - 1] < value:
        values[j], tokens[j] = values[j - 1], tokens[j - 1]
        j -= 1
    values[j], tokens[j] = value, token


@native
def keep(row: np.ndarray, weights: np.ndarray, by_weight: bool, target: float) -> None:
    """Keep tokens in falling order while what came before them is below `target` > 0; the others become −inf.

    What counts is `weights` (top-p) or 1 a token (top-k). A radix search over the bits of −row, which order like the
    distance from the maximum: 11 bits, then 10, then 10, each time only inside the bin where the target falls.
    """
    size = row.shape[0]
    keys = np.empty(size, np.int32)
    for v in range(size):
        keys[v] = np.int32(float_bits(-row[v]) & _MAGNITUDE)
    bins = np.zeros(2048, np.float64)
    if by_weight:
        for v in range(size):
            bins[keys[v] >> 20] += np.float64(weights[v])
    else:
        for v in range(size):
            bins[keys[v] >> 20] += 1.0
    limit, before = _crossing(bins, 0.0, target)
    tokens = np.empty(size, np.int32)
    count = 0
    for v in range(size):
        tokens[count] = v
        count += (keys[v] >> 20) == limit
    for shift in (10, 0):
        bins[:1024] = 0.0
        for c in range(count):
            v = tokens[c]
            bins[(keys[v] >> shift) & 1023] += np.float64(weights[v]) if by_weight else 1.0
        chosen, before = _crossing(bins[:1024], before, target)
        kept = 0
        for c in range(count):
            v = tokens[c]
            tokens[kept] = v
            kept += ((keys[v] >> shift) & 1023) == chosen
        count = kept
        limit = (limit << 10) | chosen
    last = -1  # of the tokens that share the last kept value, the highest index that is kept
    for c in range(count):
        if before >= target:
            break
        last = tokens[c]
        before += np.float64(weights[last]) if by_weight else 1.0
    for v in range(size):
        kept_here = keys[v] < limit or (keys[v] == limit and v <= last)
        row[v] = row[v] if kept_here else _MINUS_INFINITY


@native
def _crossing(bins: np.ndarray, before: float, target: float) -> tuple[int, float]:
    """The first bin in which the running sum, from `before`, reaches `target`, and the sum before that bin.

    Where rounding keeps it from being reached: the last bin that is not empty.
    """
    chosen, below = 0, before
    for b in range(bins.shape[0]):
        if bins[b] > 0.0:
            chosen, below = b, before
            before += bins[b]
            if before >= target:
                break
    return chosen, below
