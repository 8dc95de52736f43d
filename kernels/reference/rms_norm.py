"""RMSNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over its root mean square, times weight [H].

    Statistics in float32 at least, then the cast to x's dtype, then the weight (the order of HF's Qwen3).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] += delta [T, H] in place; returns rms_norm(x)."""
    x += delta
    return rms_norm(x, weight, eps)
