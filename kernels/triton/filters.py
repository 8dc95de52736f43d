"""Temperature and filters on a device, in streaming passes over a row: nothing is sorted, nothing is copied.

A row's kept tokens are those before a cut in falling order (by value, then by lowest index) that also reach min-p's
floor. The cut is a `limit` on the key, the bits of −x for the centred and scaled logit x ≤ 0, and the index of the
`last` token kept at that key. `search` finds it digit by digit, 16 thresholds a pass. Weights are summed as integers,
2⁴⁴ being the weight of the most likely token: integer sums are exact, so no tile size or order can change a result.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.triton.launch import UNFUSED
from kernels.triton.noise import exp_float32

if TYPE_CHECKING:
    from kernels.filters import SamplingRows

BLOCK = 2048  # tokens a pass takes at once
SEARCH = 512  # the same in `search`, which compares each with 16 thresholds
EVERYTHING = tl.constexpr(0x7FFFFFFF)  # above every key
_DIGITS = tl.constexpr(16)


def filter_logits_(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Same as `kernels.filters.filter_logits_`."""
    log_z = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _filter_rows[(len(logits),)](
            logits, logits.stride(0), logits.shape[1], rows.temperature, rows.top_k, rows.top_p, rows.min_p.log(),
            log_z, TILE=BLOCK, SEARCH_TILE=SEARCH, num_warps=8, **UNFUSED,
        )  # fmt: skip
    return log_z


@triton.jit
def scaled(row, token, vocabulary, top, temperature):
    """(logit − top) / temperature of the tokens, float32; −inf outside the row."""
    logit = tl.load(row + token, token < vocabulary, float("-inf")).to(tl.float32)
    return tl.math.div_rn(logit - top, temperature)


@triton.jit
def key_of(x):
    """int32 keys that fall as x ≤ 0 rises."""
    return (-x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def kept(x, token, limit, last, floor):
    """Which tokens the filters leave."""
    key = key_of(x)
    return ((key < limit) | ((key == limit) & (token <= last))) & (x >= floor)


@triton.jit
def fixed_point(x):
    """exp(x) as int64, 1 being 2⁴⁴."""
    return (exp_float32(x) * 17592186044416.0).to(tl.int64)


@triton.jit
def row_top(row, vocabulary, TILE: tl.constexpr):
    """The largest logit, or NaN if there is one."""
    top = tl.full([TILE], float("-inf"), tl.float32)
    broken = tl.zeros([TILE], tl.int32)
    for start in range(0, vocabulary, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row + token, token < vocabulary, float("-inf")).to(tl.float32)
        broken = broken | (x != x).to(tl.int32)
        top = tl.maximum(top, tl.where(x == x, x, float("-inf")))
    return tl.where(tl.max(broken, 0) > 0, float("nan"), tl.max(top, 0))


@triton.jit
def total_weight(row, vocabulary, top, temperature, limit, last, floor, TILE: tl.constexpr):
    """The fixed-point weight of the kept tokens."""
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, vocabulary, TILE):
        token = start + tl.arange(0, TILE)
        x = scaled(row, token, vocabulary, top, temperature)
        total += tl.where(kept(x, token, limit, last, floor) & (token < vocabulary), fixed_point(x), 0)
    return tl.sum(total, 0)


@triton.jit
def search(
    row, vocabulary, top, temperature, limit, last, target, everything, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr
):
    """Cut where what comes before a token reaches `target`, int64 in 1 … everything: the new limit and last.

    What counts is the weight or, for top-k, 1 a token, of tokens before the old cut, whose sum is `everything`.
    """
    digit = tl.arange(0, _DIGITS)
    low = tl.zeros([], tl.int32)
    before, until = tl.zeros([], tl.int64), everything  # what lies below `low`, and below the bracket's end
    for level in range(8):
        step = 1 << tl.maximum(27 - 4 * level, 0)
        threshold = low + digit * step
        sums = tl.zeros([_DIGITS], tl.int64)
        for start in range(0, vocabulary, TILE):
            token = start + tl.arange(0, TILE)
            x = scaled(row, token, vocabulary, top, temperature)
            key = key_of(x)
            counts = ((key < limit) | ((key == limit) & (token <= last))) & (token < vocabulary)
            if BY_WEIGHT:
                below = tl.where(counts & (key < threshold[:, None]), fixed_point(x), 0)
            else:
                below = (counts & (key < threshold[:, None])).to(tl.int64)
            sums += tl.sum(below, 1)
        reached = sums >= target
        until = tl.minimum(until, tl.min(tl.where(reached, sums, until), 0))
        before = tl.maximum(before, tl.max(tl.where(reached, 0, sums), 0))
        low += (tl.sum(tl.where(reached, 0, 1), 0) - 1) * step
    # Tokens at the key `low` share one weight; the first `wanted` of `ties` stay.
    each = tl.full([], 1, tl.int64)
    if BY_WEIGHT:
        each = fixed_point((low | (-2147483647 - 1)).to(tl.float32, bitcast=True))
    ties, wanted = (until - before) // each, (target - before + each - 1) // each
    new_last = tl.where(low == limit, last, vocabulary)
    if wanted < ties:
        seen = tl.zeros([], tl.int64)
        for start in range(0, vocabulary, TILE):
            token = start + tl.arange(0, TILE)
            tie = (key_of(scaled(row, token, vocabulary, top, temperature)) == low) & (token < vocabulary)
            count = seen + tl.cumsum(tie.to(tl.int64), 0)
            found = tl.max(tl.where(tie & (count == wanted), token, -1), 0)
            new_last = tl.where(found >= 0, found, new_last)
            seen += tl.sum(tie.to(tl.int64), 0)
    return low, new_last


@triton.jit
def find_cut(row, vocabulary, top, temperature, top_k, top_p, TILE: tl.constexpr, SEARCH_TILE: tl.constexpr):
    """The cut of top-k, then top-p, of a row whose largest logit is `top`."""
    limit, last = tl.full([], EVERYTHING, tl.int32), tl.full([], 0, tl.int32) + vocabulary
    if (top_k > 0) & (top_k < vocabulary):
        many = tl.full([], 0, tl.int64) + vocabulary
        limit, last = search(row, vocabulary, top, temperature, limit, last, top_k, many, False, SEARCH_TILE)
    if top_p < 1.0:
        total = total_weight(row, vocabulary, top, temperature, limit, last, float("-inf"), TILE)
        target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(tl.maximum(target, 1), total)  # the most likely token always stays
        limit, last = search(row, vocabulary, top, temperature, limit, last, target, total, True, SEARCH_TILE)
    return limit, last


@triton.jit
def _filter_rows(
    logits, stride, vocabulary, temperatures, top_ks, top_ps, floors, log_z, TILE: tl.constexpr,
    SEARCH_TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    temperature, floor = tl.load(temperatures + i), tl.load(floors + i)
    top = row_top(row, vocabulary, TILE)
    result = tl.full([], float("nan"), tl.float32)
    if tl.abs(top) < float("inf"):
        if temperature > 0:
            limit, last = find_cut(
                row, vocabulary, top, temperature, tl.load(top_ks + i), tl.load(top_ps + i), TILE, SEARCH_TILE
            )
            total = total_weight(row, vocabulary, top, temperature, limit, last, floor, TILE)
            for start in range(0, vocabulary, TILE):
                token = start + tl.arange(0, TILE)
                x = scaled(row, token, vocabulary, top, temperature)
                x = tl.where(kept(x, token, limit, last, floor), x, float("-inf"))
                tl.store(row + token, x, token < vocabulary)
            result = tl.log(total.to(tl.float64) * 5.684341886080802e-14).to(tl.float32)  # 2⁻⁴⁴
        else:
            all_kept = tl.full([], EVERYTHING, tl.int32)
            total = total_weight(row, vocabulary, top, 1.0, all_kept, vocabulary, float("-inf"), TILE)
            result = (top + tl.log(total.to(tl.float64) * 5.684341886080802e-14)).to(tl.float32)
    tl.store(log_z + i, result)
