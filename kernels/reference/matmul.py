"""Matrix product with a packed weight in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kernels.values import PAIRED, TILED, PackedMatrix


def matmul(x: Tensor, w: PackedMatrix) -> Tensor:
    """x [T, K] times the transpose of w [N, K] -> [T, N]."""
    if w.form in (PAIRED, TILED):
        x = x.bfloat16().to(x.dtype)
    return functional.linear(x, w.dense().to(x.dtype))
