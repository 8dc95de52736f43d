"""Edits of one row of the target's logits before temperature: penalties, logit bias, bans. Plain torch, any device."""

from __future__ import annotations

import torch


def penalize_(
    logits: torch.Tensor,
    *,
    seen_ids: torch.Tensor | None = None,
    output_ids: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    banned_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Edit logits [V] in place and return them. Every id list is int64 without repeats.

    In this order: tokens of prompt and output (`seen_ids` [S]) have positive logits divided and negative ones
    multiplied by `repetition`; tokens of the output (`output_ids` [O], `output_counts` [O]) lose `presence` once and
    `frequency` an occurrence; `bias_values` [B] are added at `bias_ids` [B]; `banned_ids` [X] become −inf.
    A drafted token counts as output at the positions after it.
    """
    if repetition != 1.0 and seen_ids is not None:
        seen = logits[seen_ids]
        logits[seen_ids] = torch.where(seen > 0, seen / repetition, seen * repetition)
    if (presence != 0.0 or frequency != 0.0) and output_ids is not None:
        assert output_counts is not None
        logits[output_ids] -= presence + frequency * output_counts.to(logits.dtype)
    if bias_ids is not None and bias_values is not None:
        logits[bias_ids] += bias_values.to(logits.dtype)
    if banned_ids is not None:
        logits[banned_ids] = float("-inf")
    return logits
