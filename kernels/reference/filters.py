"""Temperature and the three filters in plain torch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels.filters import SamplingRows


def filter_logits_(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Same as `kernels.filters.filter_logits_`."""
    temperature = rows.temperature[:, None]
    sampled = temperature > 0
    centred = (logits - logits.amax(-1, keepdim=True)) / temperature
    logits.copy_(torch.where(sampled, centred, logits))
    if rows.any_filter:
        kept = _kept(logits, rows)
        logits.masked_fill_(sampled & ~kept, float("-inf"))
    return torch.logsumexp(logits.double(), -1).float()


def _kept(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Which entries survive [N, V]: top-k, then top-p on what is left, then min-p; ties go to the lowest index."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[1], device=values.device)
    top_k = rows.top_k[:, None]
    kept = (top_k <= 0) | (rank < top_k)
    mass = torch.where(kept, (values - values[:, :1]).double().exp(), 0.0)
    before = mass.cumsum(-1) - mass
    top_p = rows.top_p[:, None]
    kept &= (top_p >= 1) | (rank == 0) | (before < top_p.double() * mass.sum(-1, keepdim=True))
    kept &= values >= values[:, :1] + rows.min_p[:, None].log()  # log 0 = −inf: off
    return torch.zeros_like(kept).scatter_(1, order, kept)
