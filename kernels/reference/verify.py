"""Verification of drafted tokens in plain torch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.reference.filters import filter_logits_
from kernels.reference.noise import exponential_rows, log_float32, uniforms

if TYPE_CHECKING:
    from kernels.filters import SamplingRows

ACCEPT, RESIDUAL, COUPLED = 1, 2, 3  # kernels.noise.Purpose


def draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first token whose cumulative weight [V] exceeds u · total; never one of weight 0."""
    cumulative = weights.double().cumsum(0)
    token = torch.searchsorted(cumulative, u.double() * cumulative[-1], right=True)
    return torch.minimum(token, weights.nonzero().max())


def pick(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """argmax(logits − log E) [N]: a sample of softmax(logits) that every caller with the same noise agrees on."""
    return (logits - log_float32(noise)).argmax(-1)


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
    """Same as `kernels.verify.verify`."""
    count = len(draft_lengths)
    accepted = torch.zeros(count, dtype=torch.int64, device=logits.device)
    next_token = torch.full_like(accepted, -1)
    failed = torch.zeros(count, dtype=torch.bool, device=logits.device)
    offsets, lengths, rows = logit_offsets.tolist(), draft_lengths.tolist(), draft_rows.tolist()
    for i in range(count):
        one = sampling.take(torch.tensor([i], device=sampling.seed.device))
        greedy, coupled = bool(one.temperature[0] <= 0), bool(one.coupled[0])
        for k in range(lengths[i] + 1):
            row = logits[offsets[i] + k]
            if not bool(torch.isfinite(row.max())):  # NaN, +inf, or all −inf
                failed[i] = True
                break
            drafted = draft_tokens[rows[i], k] if k < lengths[i] else None
            position, proposal = positions[i : i + 1] + k, proposals[i : i + 1]
            if greedy:
                token = row.argmax()
                keep = drafted is not None and bool(token == drafted)
            else:
                log_z = filter_logits_(row[None], one)
                if coupled:
                    noise = exponential_rows(one.seed, position, COUPLED, row.numel())
                    token = pick(row[None], noise)[0]
                    keep = drafted is not None and bool(token == drafted)
                else:
                    target = (row - log_z).exp()
                    weights, keep = target, False
                    guessed = drafted is not None and draft_logits is not None and rows[i] >= len(draft_logits)
                    if drafted is not None and not guessed:
                        assert draft_logits is not None and draft_log_z is not None
                        draft = (draft_logits[rows[i], k] - draft_log_z[rows[i], k]).exp()
                        u = uniforms(one.seed, position, proposal, ACCEPT)[0]
                        keep = bool(u * draft[drafted].double() < target[drafted].double())
                        if bool(draft.sum().isfinite()):
                            weights = _residual(target, draft)
                    if not keep:
                        token = draw(weights, uniforms(one.seed, position, proposal, RESIDUAL)[0])
                        keep = guessed and bool(token == drafted)
            if not keep:
                next_token[i] = token
                break
            accepted[i] += 1
    return accepted, next_token, failed


def _residual(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """max(p_t − p_d, 0); where rounding leaves nothing, all weight on the possible token nearest to it."""
    difference = target - draft
    weights = difference.clamp(min=0)
    if bool(weights.sum() > 0):
        return weights
    nearest = torch.where(target > 0, difference, float("-inf")).argmax()
    return torch.zeros_like(target).index_fill_(0, nearest, 1.0)
