"""The sequential draft head fused with sampling, on a device.

A slot takes two launches. `_score` multiplies W2 with the rows' latents over tiles of the vocabulary, adds the base
logits, and keeps what each segment of the vocabulary says about the winner; greedy and unfiltered coupled rows
store no logits. `_choose` settles a row's token, from stored logits where it samples by rejection or through filters.

A coupled row's winner is taken from scores that round differently than `kernels.noise.pick` (`kernels.triton.race`).
One slot of some 10⁵ may then hold another draft than on another backend; the output's law does not change.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.reference.markov_sample import latent
from kernels.triton.filters import find_cut, kept, scaled, total_weight
from kernels.triton.inverse import draw
from kernels.triton.launch import UNFUSED, dot, narrow
from kernels.triton.noise import exponential_from_bits, log_float32, uniform, words
from kernels.triton.race import COUPLED, pick

if TYPE_CHECKING:
    from kernels.filters import SamplingRows
    from kernels.markov_sample import HeadWeights

ROWS, SEGMENT, WIDTH, BLOCK, SEARCH = 16, 512, 64, 2048, 512  # WIDTH: tokens of a tile of `_score`
_DRAFT = tl.constexpr(0)  # kernels.noise.Purpose
_NOBODY = tl.constexpr(0x7FFFFFFF)


def markov_sample(
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    head: HeadWeights,
    sampling: SamplingRows,
    positions: torch.Tensor,
    proposals: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Same as `kernels.markov_sample.markov_sample`, as a plain tuple."""
    count, block, vocabulary = base_logits.shape
    device = base_logits.device
    base_logits = base_logits.contiguous()
    tokens = torch.zeros((count, block), dtype=torch.int64, device=device)
    log_z = torch.zeros((count, block), dtype=torch.float32, device=device)
    kept_logits = torch.empty((count, block, vocabulary), device=device) if sampling.any_rejection else None
    work = kept_logits
    if work is None:  # filters look at all logits of a slot, and at no earlier slot's
        work = torch.empty((count, 1, vocabulary) if sampling.any_filter else (1, 1, 1), device=device)
    if count == 0 or block == 0:
        return tokens, kept_logits, log_z, _confidence(hidden, anchors, tokens, head)
    segments, padded = triton.cdiv(vocabulary, SEGMENT), max(16, triton.next_power_of_2(head.rank))
    scores = torch.empty((count, segments, 2), device=device)
    winners = torch.empty((count, segments), dtype=torch.int32, device=device)
    rules = (
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p.log(), sampling.coupled,
        sampling.seed, positions,
    )  # fmt: skip
    state = torch.zeros((count, head.rank), device=device)
    previous = anchors
    for k in range(block):
        features, w2 = base_logits, base_logits
        if head.kind != "none":
            assert head.w1 is not None and head.w2 is not None
            features, state = latent(head, state, head.w1[previous].float(), hidden[:, k].float())
            features, w2 = features.float().contiguous(), head.w2.contiguous()
        slot = work[:, k if kept_logits is not None else 0]
        _score[(triton.cdiv(count, ROWS), segments)](
            base_logits, features, w2, count, block, k, vocabulary, max(head.rank, 1), *rules, slot, slot.stride(0),
            scores, winners, segments, HAS_BIAS=head.kind != "none", BLOCK_M=ROWS, SIZE=SEGMENT,
            TILE=WIDTH if w2.dtype.itemsize == 2 else WIDTH // 2,  # wider factors spill
            RANK=padded, CHUNK=min(padded, 64), num_warps=4, **UNFUSED,
        )  # fmt: skip
        _choose[(count,)](
            slot, slot.stride(0), k, block, vocabulary, *rules, proposals, scores, winners, segments, tokens, log_z,
            SEGMENTS=triton.next_power_of_2(segments), TILE=BLOCK, SEARCH_TILE=SEARCH, num_warps=8, **UNFUSED,
        )  # fmt: skip
        previous = tokens[:, k]
    return tokens, kept_logits, log_z, _confidence(hidden, anchors, tokens, head)


def _confidence(
    hidden: torch.Tensor, anchors: torch.Tensor, tokens: torch.Tensor, head: HeadWeights
) -> torch.Tensor | None:
    if head.confidence_weight is None:
        return None
    inputs = hidden.float()
    if head.confidence_with_markov:
        assert head.w1 is not None
        before = torch.cat([anchors[:, None], tokens[:, :-1]], 1)[:, : tokens.shape[1]]
        inputs = torch.cat([inputs, head.w1[before].float()], -1)
    score: torch.Tensor = (inputs * head.confidence_weight.float().flatten()).sum(-1) + head.confidence_bias
    return score.sigmoid()


@triton.jit
def _score(
    base, latents, w2, count, block, k, vocabulary, rank,
    temperatures, top_ks, top_ps, floors, coupled, seeds, positions, logits, logits_stride,
    scores, winners, segments,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = i < count
    i = i.to(tl.int64)
    temperature, shared = tl.load(temperatures + i, mine, 0.0), tl.load(coupled + i, mine, False)
    seed, position = tl.load(seeds + i, mine, 0), tl.load(positions + i, mine, 0) + 1 + k
    filtered = tl.load(top_ks + i, mine, 0) > 0
    filtered = filtered | (tl.load(top_ps + i, mine, 1.0) < 1.0) | (tl.load(floors + i, mine, 0.0) > float("-inf"))
    filtered = filtered & mine
    sampled = temperature > 0
    noisy = sampled & shared & (filtered == 0)
    stored = mine & sampled & (noisy == 0)
    divisor = tl.where(noisy, temperature, 1.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_M], tl.int32)
    begin = tl.program_id(1) * SIZE
    for start in range(begin, tl.minimum(begin + SIZE, vocabulary), TILE):
        token = start + tl.arange(0, TILE)
        inside = mine[:, None] & (token < vocabulary)[None, :]
        x = tl.load(base + (i[:, None] * block + k) * vocabulary + token[None, :], inside, float("-inf"))
        x = x.to(tl.float32)
        if HAS_BIAS:
            bias = tl.zeros([BLOCK_M, TILE], tl.float32)
            for part in range(0, RANK, CHUNK):
                r = part + tl.arange(0, CHUNK)
                h = tl.load(latents + i[:, None] * rank + r[None, :], mine[:, None] & (r < rank)[None, :], 0.0)
                at = token.to(tl.int64)[:, None] * rank + r[None, :]
                w = tl.trans(tl.load(w2 + at, (token < vocabulary)[:, None] & (r < rank)[None, :], 0.0))
                high = narrow(h, w2.dtype.element_ty)
                bias = dot(high, w, bias)
                if w2.dtype.element_ty != tl.float32:  # two 16-bit factors hold the latent to 2⁻¹⁶
                    bias = dot(narrow(h - high.to(tl.float32), w2.dtype.element_ty), w, bias)
            x += bias
        tl.store(logits + i[:, None] * logits_stride + token[None, :], x, inside & stored[:, None])
        broken = tl.max((x != x).to(tl.int32), 1) > 0
        x = tl.where(x == x, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        moved = tl.where(top < new_top, tl.math.div_rn(top - new_top, divisor), 0.0)
        score = tl.where(x > float("-inf"), tl.math.div_rn(x - new_top[:, None], divisor[:, None]), float("-inf"))
        if tl.max(noisy.to(tl.int32), 0) > 0:
            bits = words(seed[:, None], position[:, None], COUPLED, start, TILE)
            score = tl.where(noisy[:, None], score - log_float32(exponential_from_bits(bits)), score)
        tile_best = tl.max(score, 1)
        tile_winner = tl.min(tl.where(score == tile_best[:, None], token[None, :], _NOBODY), 1)
        best += moved
        winner = tl.where(tile_best > best, tile_winner, winner)
        best = tl.maximum(best, tile_best)
        top = tl.where(broken | (top != top), float("nan"), new_top)
    to = i * segments + tl.program_id(1)
    tl.store(scores + 2 * to, top, mine)
    tl.store(scores + 2 * to + 1, best, mine)
    tl.store(winners + to, winner, mine)


@triton.jit
def _choose(
    logits, stride, k, block, vocabulary,
    temperatures, top_ks, top_ps, floors, coupled, seeds, positions, proposals, scores, winners, segments,
    tokens, log_zs, SEGMENTS: tl.constexpr, TILE: tl.constexpr, SEARCH_TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    temperature, floor, shared = tl.load(temperatures + i), tl.load(floors + i), tl.load(coupled + i)
    top_k, top_p = tl.load(top_ks + i), tl.load(top_ps + i)
    seed, position = tl.load(seeds + i), tl.load(positions + i) + 1 + k
    filtered = (top_k > 0) | (top_p < 1.0) | (floor > float("-inf"))
    segment = tl.arange(0, SEGMENTS)
    at, inside = i * segments + segment, segment < segments
    tops = tl.load(scores + 2 * at, inside, float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), 0) > 0
    tops = tl.where(tops == tops, tops, float("-inf"))
    top = tl.where(broken, float("nan"), tl.max(tops, 0))
    token, log_z = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    row = logits + i * stride
    usable = tl.abs(top) < float("inf")
    if (temperature <= 0) | (shared & (filtered == 0)):
        if usable:
            divisor = tl.where(temperature > 0, temperature, 1.0)
            moved = tl.where(tops > float("-inf"), tl.math.div_rn(tops - top, divisor), float("-inf"))
            best = tl.where(moved > float("-inf"), tl.load(scores + 2 * at + 1, inside, float("-inf")) + moved, moved)
            winner = tl.load(winners + at, inside, _NOBODY)
            token = tl.min(tl.where(best == tl.max(best, 0), winner, _NOBODY), 0)
    else:
        if usable:
            limit, last = find_cut(row, vocabulary, top, temperature, top_k, top_p, TILE, SEARCH_TILE)
            if shared:
                token = pick(row, vocabulary, top, temperature, limit, last, floor, seed, position, TILE)
            else:
                total = total_weight(row, vocabulary, top, temperature, limit, last, floor, TILE)
                log_z = tl.log(total.to(tl.float64) * 5.684341886080802e-14).to(tl.float32)
                u = uniform(seed, position, tl.load(proposals + i), _DRAFT)
                alone = tl.full([], float("nan"), tl.float32)
                token = draw(row, vocabulary, top, temperature, limit, last, floor, total, row, alone, u, TILE)
                for start in range(0, vocabulary, TILE):
                    v = start + tl.arange(0, TILE)
                    x = scaled(row, v, vocabulary, top, temperature)
                    tl.store(row + v, tl.where(kept(x, v, limit, last, floor), x, float("-inf")), v < vocabulary)
        else:
            log_z = tl.where(shared, 0.0, float("nan"))
    tl.store(tokens + i * block + k, token.to(tl.int64))
    tl.store(log_zs + i * block + k, log_z)
