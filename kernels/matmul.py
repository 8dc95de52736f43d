"""Matrix products with prepacked weights."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import layer_frame as f
from kernels.jit import routine
from kernels.layer_native import multiply_stage
from kernels.reference import matmul as reference
from kernels.threads import get_threads, run
from kernels.values import PANEL, PackedMatrix

__all__ = ["PackedMatrix", "matmul", "pack"]


def pack(weight: Tensor) -> PackedMatrix:
    """Bring weight [N, K] into the layout that its device and dtype multiply fastest.

    On CPU in float32 a matrix whose entries all fit bfloat16 is kept in 16 bits: few rows are bound by reading
    the weights, and the results are the same to the bit.
    """
    n, k = weight.shape
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return PackedMatrix(n, k, weight.contiguous(), None)
    padded = functional.pad(weight.detach(), (0, 0, 0, -n % PANEL))
    panels = padded.view(-1, PANEL, k).transpose(1, 2).contiguous()
    bits = panels.view(torch.int32)
    if not (bits & 0xFFFF).any():
        low, high = bits.chunk(2, dim=2)
        panels = (((low >> 16) & 0xFFFF) | high).contiguous()
    return PackedMatrix(n, k, None, panels)


def matmul(x: Tensor, w: PackedMatrix) -> Tensor:
    """x [T, K] times the transpose of w [N, K] -> [T, N]. On CPU in float32 rows do not affect each other."""
    panels = w.panels
    if panels is None or x.dtype != torch.float32 or not x.is_contiguous() or x.dim() != 2:
        return reference.matmul(x, w)
    rows, k = x.shape
    if k != w.k:
        raise ValueError(f"x has {k} columns, the matrix {w.k}")
    out = x.new_empty((rows, w.n))
    threads = get_threads()
    scratch = np.empty(threads * f.SPILL, np.uint8)
    frame = np.array(
        (
            *(0, threads, rows, x.data_ptr(), panels.data_ptr(), w.halved, w.n, k, out.data_ptr()),
            scratch.ctypes.data,
        ),
        np.int64,
    )
    run(_multiply(), frame.ctypes.data, 1)
    return out


@routine
def _multiply(frame, worker):
    rows, n, k = f.word(frame, 2), f.word(frame, 6), f.word(frame, 7)
    multiply_stage(
        f.word(frame, 0),
        0,
        f.word(frame, 1),
        rows,
        f.word(frame, 3),
        k * 4,
        f.word(frame, 4),
        f.word(frame, 5),
        n,
        k,
        f.word(frame, 8),
        n * 4,
        0,
        f.word(frame, 9) + worker * f.SPILL,
    )
