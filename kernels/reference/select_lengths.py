"""Sharing a budget of verified tokens among drafted blocks, in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def select_lengths(confidence: Tensor, weights: Tensor, limits: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Same as `kernels.select_lengths.select_lengths`."""
    rows, block = confidence.shape
    survival = torch.zeros_like(confidence)
    alive = torch.ones_like(weights)
    for j in range(block):
        alive = alive * confidence[:, j].nan_to_num(0.0).clamp(0.0, 1.0)
        survival[:, j] = alive
    slot = torch.arange(block, device=confidence.device)
    allowed = (slot < limits[:, None]).T.flatten()
    gain = torch.where(allowed, (weights[:, None] * survival).T.flatten(), -1.0)
    order = gain.sort(descending=True, stable=True).indices  # ties: by position, then by row
    place = torch.empty_like(order)
    place[order] = torch.arange(rows * block, device=confidence.device)
    chosen = allowed & (place < budget)
    return chosen.view(block, rows).sum(0), survival
