"""Verification on a device, without a workspace of probabilities.

`_race` reads the logits once, in segments that run side by side; greedy and unfiltered coupled rows need no more.
`_weigh` finds the cut and the total weight of rows that sample by rejection or through filters, streaming over the
row. `_decide` then walks through each sequence's positions, and only for the one that ends the walk draws
from the residual or the bonus distribution, streaming again.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.triton.filters import EVERYTHING, find_cut, kept, scaled, total_weight
from kernels.triton.inverse import draw
from kernels.triton.launch import UNFUSED, rows_last
from kernels.triton.noise import exp_float32, uniform
from kernels.triton.race import AMBIGUOUS, advance, pick

if TYPE_CHECKING:
    from kernels.filters import SamplingRows

SEGMENT, BLOCK, SEARCH = 8192, 2048, 512  # tokens a program of `_race`, of a tile, of a tile of `filters.search`
_ACCEPT, _RESIDUAL = tl.constexpr(1), tl.constexpr(2)  # kernels.noise.Purpose


def verify(
    logits: torch.Tensor,
    logit_offsets: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_log_z: torch.Tensor | None,
    draft_rows: torch.Tensor,
    sampling: SamplingRows,
    positions: torch.Tensor,
    proposals: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same as `kernels.verify.verify`; logits of 16 bits do, too, and stay as they are."""
    logits = rows_last(logits)
    count, (lines, vocabulary) = len(draft_lengths), logits.shape
    device = logits.device
    accepted = torch.empty(count, dtype=torch.int64, device=device)
    next_token, failed = torch.empty_like(accepted), torch.empty(count, dtype=torch.bool, device=device)
    if count == 0:
        return accepted, next_token, failed
    draft_tokens = draft_tokens.to(device).contiguous()  # empty, and anywhere, where nothing was drafted
    block = max(draft_tokens.shape[-1], 1)
    segments = triton.cdiv(vocabulary, SEGMENT)
    scores = torch.empty((lines, segments, 3), dtype=torch.float32, device=device)
    tokens = torch.empty((lines, segments), dtype=torch.int32, device=device)
    cuts = torch.empty((lines, 2), dtype=torch.int32, device=device)
    totals = torch.empty(lines, dtype=torch.int64, device=device)
    owner = torch.searchsorted(logit_offsets, torch.arange(lines, device=device), right=True)
    owner = owner.sub_(1).clamp_(max=count - 1)
    padded = triton.next_power_of_2(segments)
    common = (logits, logits.stride(0), vocabulary, logit_offsets)
    rules = (
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p.log(), sampling.coupled,
        sampling.seed, positions,
    )  # fmt: skip
    _race[(lines, segments)](
        *common, owner, *rules, scores, tokens, segments, SIZE=SEGMENT, TILE=BLOCK, num_warps=8, **UNFUSED
    )
    _weigh[(lines,)](
        *common, owner, *rules, scores, tokens, cuts, totals, segments,
        SEGMENTS=padded, TILE=BLOCK, SEARCH_TILE=SEARCH, num_warps=8, **UNFUSED,
    )  # fmt: skip
    if draft_logits is None or draft_log_z is None:  # no row reads them
        draft_logits, draft_log_z = logits, totals
    draft_logits, draft_log_z = draft_logits.contiguous(), draft_log_z.contiguous()
    laws, logit_block = draft_log_z.shape if draft_log_z.dim() == 2 else (0, 1)  # tokens may be more: guesses
    _decide[(count,)](
        *common, draft_tokens, draft_lengths, draft_logits, draft_log_z, draft_rows, block, laws, logit_block, *rules,
        proposals, scores, tokens, cuts, totals, accepted, next_token, failed, segments,
        SEGMENTS=padded, TILE=BLOCK, num_warps=8, **UNFUSED,
    )  # fmt: skip
    return accepted, next_token, failed


@triton.jit
def _race(
    logits, stride, vocabulary, offsets, owner, temperatures, top_ks, top_ps, floors, coupled, seeds, positions,
    scores, tokens, segments, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One segment of one row: its largest logit (NaN if it holds one), the two best scores, and the winner."""
    line, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.load(owner + line)
    temperature = tl.load(temperatures + i)
    open_to_all = (tl.load(top_ks + i) <= 0) & (tl.load(top_ps + i) >= 1.0) & (tl.load(floors + i) == float("-inf"))
    noisy = (temperature > 0) & tl.load(coupled + i) & open_to_all
    seed, position = tl.load(seeds + i), tl.load(positions + i) + line - tl.load(offsets + i)
    top, best = tl.full([], float("-inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    second, winner = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    broken = tl.zeros([], tl.int32)
    begin = segment * SIZE
    for start in range(begin, tl.minimum(begin + SIZE, vocabulary), TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits + line * stride + token, token < vocabulary, float("-inf")).to(tl.float32)
        broken = tl.maximum(broken, tl.max((x != x).to(tl.int32), 0))
        x = tl.where(x == x, x, float("-inf"))
        if noisy:
            top, best, second, winner = advance(
                x, token, temperature, seed, position, top, best, second, winner, True, TILE
            )
        else:
            top, best, second, winner = advance(
                x, token, temperature, seed, position, top, best, second, winner, False, TILE
            )
    to = line * segments + segment
    tl.store(scores + 3 * to, tl.where(broken > 0, float("nan"), top))
    tl.store(scores + 3 * to + 1, best)
    tl.store(scores + 3 * to + 2, second)
    tl.store(tokens + to, winner)


@triton.jit
def _row_top(scores, line, segments, SEGMENTS: tl.constexpr):
    """The row's largest logit and those of its segments; NaN if one of them is."""
    segment = tl.arange(0, SEGMENTS)
    tops = tl.load(scores + 3 * (line * segments + segment), segment < segments, float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), 0) > 0
    return tl.where(broken, float("nan"), tl.max(tl.where(tops == tops, tops, float("-inf")), 0)), tops


@triton.jit
def _weigh(
    logits, stride, vocabulary, offsets, owner, temperatures, top_ks, top_ps, floors, coupled, seeds, positions,
    scores, tokens, cuts, totals, segments, SEGMENTS: tl.constexpr, TILE: tl.constexpr, SEARCH_TILE: tl.constexpr,
):  # fmt: skip
    """Cut and total weight of a rejection row; the token of a filtered coupled row (kept in its first segment)."""
    line = tl.program_id(0).to(tl.int64)
    i = tl.load(owner + line)
    temperature, top_k, top_p = tl.load(temperatures + i), tl.load(top_ks + i), tl.load(top_ps + i)
    floor, shared = tl.load(floors + i), tl.load(coupled + i)
    open_to_all = (top_k <= 0) & (top_p >= 1.0) & (floor == float("-inf"))
    top, _ = _row_top(scores, line, segments, SEGMENTS)
    row = logits + line * stride
    if (temperature > 0) & (tl.abs(top) < float("inf")) & ((shared & open_to_all) == 0):
        limit, last = find_cut(row, vocabulary, top, temperature, top_k, top_p, TILE, SEARCH_TILE)
        if shared:
            position = tl.load(positions + i) + line - tl.load(offsets + i)
            winner = pick(row, vocabulary, top, temperature, limit, last, floor, tl.load(seeds + i), position, TILE)
            tl.store(tokens + line * segments, winner)
        else:
            tl.store(totals + line, total_weight(row, vocabulary, top, temperature, limit, last, floor, TILE))
            tl.store(cuts + 2 * line, limit)
            tl.store(cuts + 2 * line + 1, last)


@triton.jit
def _settle(
    row, line, vocabulary, temperature, filtered, seed, position, scores, tokens, segments, top, tops,
    SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of a greedy or coupled row, from what its segments left."""
    segment = tl.arange(0, SEGMENTS)
    at, inside = line * segments + segment, segment < segments
    winners = tl.load(tokens + at, inside, 0x7FFFFFFF)
    token = tl.min(tl.where(tops == top, winners, 0x7FFFFFFF), 0)
    if temperature > 0:
        if filtered:
            token = tl.load(tokens + line * segments)
        else:
            moved = tl.where(tops > float("-inf"), tl.math.div_rn(tops - top, temperature), float("-inf"))
            best = tl.load(scores + 3 * at + 1, inside, float("-inf")) + moved
            second = tl.load(scores + 3 * at + 2, inside, float("-inf")) + moved
            best = tl.where(moved > float("-inf"), best, float("-inf"))
            highest = tl.max(best, 0)
            token = tl.min(tl.where(best == highest, winners, 0x7FFFFFFF), 0)
            second = tl.where(moved > float("-inf"), second, float("-inf"))
            rival = tl.max(tl.maximum(tl.where(winners == token, float("-inf"), best), second), 0)
            if rival + AMBIGUOUS >= highest:
                everything = tl.full([], EVERYTHING, tl.int32)
                token = pick(
                    row, vocabulary, top, temperature, everything, vocabulary, float("-inf"), seed, position, TILE
                )
    return token


@triton.jit
def _decide(
    logits, stride, vocabulary, offsets,
    draft_tokens, draft_lengths, draft_logits, draft_log_z, draft_rows, block, laws, logit_block,
    temperatures, top_ks, top_ps, floors, coupled, seeds, positions, proposals,
    scores, tokens, cuts, totals, accepted, next_token, failed, segments,
    SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    temperature, floor, shared = tl.load(temperatures + i), tl.load(floors + i), tl.load(coupled + i)
    filtered = (tl.load(top_ks + i) > 0) | (tl.load(top_ps + i) < 1.0) | (floor > float("-inf"))
    seed, position, proposal = tl.load(seeds + i), tl.load(positions + i), tl.load(proposals + i)
    first, length = tl.load(offsets + i), tl.load(draft_lengths + i)
    owner = tl.load(draft_rows + i)
    drafts, known = owner * block, owner * logit_block
    slot, chosen = length * 0, length * 0 - 1
    wrong, walking = slot < 0, slot == 0
    while walking:
        line = first + slot
        row = logits + line * stride
        top, tops = _row_top(scores, line, segments, SEGMENTS)
        drafted = tl.load(draft_tokens + drafts + slot, slot < length, -1)
        if not (tl.abs(top) < float("inf")):
            wrong, walking = slot == slot, slot < 0
        else:
            token = drafted
            if shared | (temperature <= 0):
                token = _settle(
                    row, line, vocabulary, temperature, filtered, seed, position + slot, scores, tokens, segments,
                    top, tops, SEGMENTS, TILE,
                ).to(tl.int64)  # fmt: skip
            else:
                total, limit = tl.load(totals + line), tl.load(cuts + 2 * line)
                last = tl.load(cuts + 2 * line + 1)
                draft_row, log_z, keep = draft_logits, tl.full([], float("nan"), tl.float32), slot < 0
                if (drafted >= 0) & (owner < laws):
                    draft_row = draft_logits + (known + slot) * vocabulary
                    log_z = tl.load(draft_log_z + known + slot).to(tl.float32)
                    x = scaled(row, drafted, vocabulary, top, temperature)
                    weight = tl.where(kept(x, drafted, limit, last, floor), exp_float32(x), 0.0).to(tl.float64)
                    draft = exp_float32(tl.load(draft_row + drafted).to(tl.float32)).to(tl.float64)
                    draft *= tl.exp(-log_z.to(tl.float64))
                    u = uniform(seed, position + slot, proposal, _ACCEPT)
                    keep = u * draft < weight / (total.to(tl.float64) * 5.684341886080802e-14)
                if not keep:
                    u = uniform(seed, position + slot, proposal, _RESIDUAL)
                    token = draw(
                        row, vocabulary, top, temperature, limit, last, floor, total, draft_row, log_z, u, TILE
                    ).to(tl.int64)
                    if owner < laws:
                        drafted = drafted * 0 - 1  # never the accepted one, even if it is drawn again
            if (token == drafted) & (slot < length):
                slot += 1
            else:
                chosen, walking = token, slot < 0
    tl.store(accepted + i, slot)
    tl.store(next_token + i, chosen)
    tl.store(failed + i, wrong)
