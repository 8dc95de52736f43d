"""Rotary embedding: the table of angles, and the native rotation."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch

from kernels.jit import native
from kernels.simd import load, splat, store
from kernels.values import RopeTable

__all__ = ["RopeTable", "rope_table", "rotate"]


def rope_table(
    length: int, head_dim: int, theta: float, device: torch.device | str = "cpu", *, factor: float = 1.0
) -> RopeTable:
    """Angles of positions 0 … length−1, float32, by the very operations of HF's default and linear ropes.

    inv_freq[i] = 1 / theta^(2i / head_dim) / factor; angle = position · inv_freq.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (theta**exponents) / factor
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
    return RopeTable(angles.cos().contiguous().to(device), angles.sin().contiguous().to(device))


@native
def rotate(head, cos, sin, head_dim, scale):
    """Rotate one head in place and multiply it by `scale`; cos and sin are the position's rows of the table."""
    half = head_dim * 2
    factor = splat(scale)
    for at in range(0, half, 64):
        first, second = load(head + at), load(head + half + at)
        c, s = load(cos + at), load(sin + at)
        store(head + at, (first * c - second * s) * factor)
        store(head + half + at, (second * c + first * s) * factor)
