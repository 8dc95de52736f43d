"""Survival products and their top K across requests, in one program. See `kernels.select_lengths`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import UNFUSED

MOST = 1 << 16  # candidates that one program holds


def fits(confidence: torch.Tensor) -> bool:
    """Whether all candidates fit into one program."""
    rows, block = confidence.shape
    return triton.next_power_of_2(max(rows, 1)) * triton.next_power_of_2(max(block, 1)) <= MOST


def select_lengths(
    confidence: torch.Tensor, weights: torch.Tensor, limits: torch.Tensor, budget: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same as `kernels.select_lengths.select_lengths`."""
    rows, block = confidence.shape
    lengths = torch.zeros(rows, dtype=torch.int64, device=confidence.device)
    survival = torch.empty((rows, block), dtype=torch.float32, device=confidence.device)
    if rows and block:
        wide, deep = triton.next_power_of_2(rows), triton.next_power_of_2(block)
        _select[(1,)](
            confidence, weights.contiguous(), limits.contiguous(), budget, lengths, survival, rows, block,
            *confidence.stride(), BLOCK_R=wide, BLOCK_J=deep, INDEX_BITS=(wide * deep).bit_length(),
            num_warps=min(max(wide * deep // 1024, 1), 32), **UNFUSED,
        )  # fmt: skip
    return lengths, survival


@triton.jit
def _count(chosen):
    return tl.sum(tl.sum(chosen.to(tl.int32), 1), 0)


@triton.jit
def _select(
    confidence, weights, limits, budget, lengths, survival, rows, block, row_stride, slot_stride,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, INDEX_BITS: tl.constexpr,
):  # fmt: skip
    """Gains order like their bits: bisect for the last gain that is taken, then for the last place that shares it."""
    row, slot = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_J)[:, None]
    mine = row < rows
    weight, limit = tl.load(weights + row, mine, 0.0), tl.load(limits + row, mine, 0)
    alive = tl.full([BLOCK_R], 1.0, tl.float32)
    keys = tl.full([BLOCK_J, BLOCK_R], -1, tl.int32)
    for j in range(block):
        c = tl.load(confidence + row.to(tl.int64) * row_stride + j * slot_stride, mine, 0.0).to(tl.float32)
        alive = alive * tl.where(c > 0, tl.minimum(c, 1.0), 0.0)
        tl.store(survival + row * block + j, alive, mine)
        key = tl.where(mine & (j < limit), tl.maximum(weight * alive, 0.0).to(tl.int32, bitcast=True), -1)
        keys = tl.where(slot == j, key[None, :], keys)
    wanted = tl.minimum(tl.load(budget), _count(keys >= 0).to(tl.int64)).to(tl.int32)
    last = tl.zeros([], tl.int32)
    for bit in range(31):
        higher = last | (1 << (30 - bit))
        last = tl.where(_count(keys >= higher) >= wanted, higher, last)
    ties, left = keys == last, wanted - _count(keys > last)
    place = slot * BLOCK_R + row[None, :]
    cut = tl.zeros([], tl.int32)  # the longest run of places that holds fewer than `left` ties
    for bit in range(INDEX_BITS):
        longer = cut | (1 << (INDEX_BITS - 1 - bit))
        cut = tl.where(_count(ties & (place < longer)) < left, longer, cut)
    chosen = ((keys > last) | (ties & (place <= cut))) & (wanted > 0)
    tl.store(lengths + row, tl.sum(chosen.to(tl.int64), 0), mine)
