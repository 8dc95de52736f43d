"""Matrix products with prepacked weights."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import threading
from array import array

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


class _Spill(threading.local):
    """What tiles of a calling thread and its helpers may scribble on."""

    def __init__(self) -> None:
        self.reserve(2)

    def reserve(self, threads: int) -> None:
        self.threads = threads
        self.memory = np.empty(threads * f.SPILL, np.uint8)
        self.address = self.memory.ctypes.data


_spill = _Spill()


def matmul(x: Tensor, w: PackedMatrix) -> Tensor:
    """x [T, K] times the transpose of w [N, K] -> [T, N]. On CPU in float32 rows do not affect each other.

    Raises:
        ValueError: x does not have K columns.
    """
    rows, k = x.shape
    if k != w.k:
        raise ValueError(f"x has {k} columns, the matrix {w.k}")
    if not w.address or x.dtype != torch.float32 or not x.is_cpu:
        return reference.matmul(x, w)
    if not x.is_contiguous():
        x = x.contiguous()
    out = x.new_empty((rows, w.n))
    threads = get_threads()
    if threads > _spill.threads:
        _spill.reserve(threads)
    words = (0, threads, rows, x.data_ptr(), w.address, w.halved, w.n, k, out.data_ptr(), _spill.address)
    frame = array("q", words)  # named: it must outlive the call
    run(_multiply(), frame.buffer_info()[0], 1)
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
