"""Half-split rotary embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.values import RopeTable


def apply_rope(x: Tensor, rope: RopeTable, positions: Tensor) -> Tensor:
    """Rotate x [T, heads, D] to its rows' positions [T]: pairs are (i, i + D/2), as in HF's Llama family."""
    cos = rope.cos[positions].unsqueeze(1).to(x.dtype)
    sin = rope.sin[positions].unsqueeze(1).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
