"""Drawing a token by the inverse of a cumulative sum, streaming over a row. Device functions.

Sums are integers, so that the token at a uniform number is the same for any tile size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.filters import fixed_point, kept, scaled
from kernels.triton.noise import exp_float32


@triton.jit
def _difference(row, draft_row, token, vocabulary, top, temperature, limit, last, floor, scale_target, scale_draft):
    """p_t − p_d of some tokens, and which of them the target allows. Not fused: equal laws must cancel exactly."""
    x = scaled(row, token, vocabulary, top, temperature)
    allowed = kept(x, token, limit, last, floor) & (token < vocabulary) & (x > float("-inf"))
    weight = tl.where(allowed, exp_float32(x), 0.0)
    draft = exp_float32(tl.load(draft_row + token, token < vocabulary, float("-inf")).to(tl.float32))
    return weight * scale_target - draft * scale_draft, allowed & (weight > 0)


@triton.jit
def _residual(row, draft_row, token, vocabulary, top, temperature, limit, last, floor, scale_target, scale_draft):
    """max(p_t − p_d, 0) as int64, 1 being 2⁶⁰."""
    difference, _ = _difference(
        row, draft_row, token, vocabulary, top, temperature, limit, last, floor, scale_target, scale_draft
    )
    return (tl.maximum(difference, 0.0) * 1152921504606846976.0).to(tl.int64)


@triton.jit
def _weight(row, token, vocabulary, top, temperature, limit, last, floor):
    x = scaled(row, token, vocabulary, top, temperature)
    return tl.where(kept(x, token, limit, last, floor) & (token < vocabulary), fixed_point(x), 0)


@triton.jit
def crossing(weights, token, below, target, found):
    """The first token at which the running sum, from `below`, exceeds `target`; `found` if that was before."""
    mass = tl.sum(weights, 0)
    if (found < 0) & (below + mass > target):
        sums = below + tl.cumsum(weights, 0)
        found = tl.min(tl.where(sums > target, token, 0x7FFFFFFF), 0)
    return below + mass, found


@triton.jit
def aim(u, total):
    """Where u in (0, 1) falls in 0 … total − 1."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def draw(row, vocabulary, top, temperature, limit, last, floor, total, draft_row, log_z, u, TILE: tl.constexpr):
    """A token of max(p_t − p_d, 0), or of p_t where log_z is not finite: no draft, or a broken one.

    Where rounding leaves nothing of the residual, the possible token with the largest difference.
    """
    below, found = total * 0, tl.full([], -1, tl.int32)
    if tl.abs(log_z) < float("inf"):
        scale_target = (1.0 / (total.to(tl.float64) * 5.684341886080802e-14)).to(tl.float32)
        scale_draft = tl.exp(-log_z.to(tl.float64)).to(tl.float32)
        sums = tl.zeros([TILE], tl.int64)
        for start in range(0, vocabulary, TILE):
            token = start + tl.arange(0, TILE)
            sums += _residual(
                row, draft_row, token, vocabulary, top, temperature, limit, last, floor, scale_target, scale_draft
            )
        left = tl.sum(sums, 0)
        if left > 0:
            target = aim(u, left)
            for start in range(0, vocabulary, TILE):
                token = start + tl.arange(0, TILE)
                weights = _residual(
                    row, draft_row, token, vocabulary, top, temperature, limit, last, floor, scale_target, scale_draft
                )
                below, found = crossing(weights, token, below, target, found)
        else:
            largest = tl.full([], float("-inf"), tl.float32)
            for start in range(0, vocabulary, TILE):
                token = start + tl.arange(0, TILE)
                difference, allowed = _difference(
                    row, draft_row, token, vocabulary, top, temperature, limit, last, floor, scale_target, scale_draft
                )
                difference = tl.where(allowed, difference, float("-inf"))
                tile_largest = tl.max(difference, 0)
                if tile_largest > largest:
                    found = tl.min(tl.where(difference == tile_largest, token, 0x7FFFFFFF), 0)
                    largest = tile_largest
    else:
        target = aim(u, total)
        for start in range(0, vocabulary, TILE):
            token = start + tl.arange(0, TILE)
            weights = _weight(row, token, vocabulary, top, temperature, limit, last, floor)
            below, found = crossing(weights, token, below, target, found)
    return found
