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
from kernels.amx import HAS_TILES
from kernels.jit import routine
from kernels.layer_products import multiply_stage
from kernels.reference import matmul as reference
from kernels.threads import get_threads, run
from kernels.values import FULL, HALVED, PAIRED, PANEL, TILED, PackedMatrix

__all__ = ["PackedMatrix", "matmul", "pack"]


class _Shelf:
    """Memory for panels, in large pieces: weights that follow each other in a few huge pages stream fastest."""

    PIECE = 8 << 20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.int32)

    def take(self, size: int) -> Tensor:
        """Room for `size` words, on cache lines of its own; a piece lives as long as anything on it."""
        whole = -(-size // 16) * 16
        if whole > self._free.numel():
            piece = torch.empty(max(whole, self.PIECE // 4) + 16, dtype=torch.int32)
            self._free = piece[-piece.data_ptr() % 64 // 4 :]
        place, self._free = self._free[:size], self._free[whole:]
        return place


_shelf = _Shelf()


def pack(weight: Tensor) -> PackedMatrix:
    """Bring weight [N, K] into the layout that its device and dtype multiply fastest.

    On CPU a bfloat16 weight makes a product of bfloat16 factors and float32 sums, on float32 rows. A float32 matrix
    whose entries all fit bfloat16 is kept in 16 bits, too: few rows are bound by reading the weights, and the
    results are the same to the bit.
    """
    n, k = weight.shape
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return PackedMatrix(n, k, weight.contiguous(), None)
    weight = weight.detach()
    # A few panels at a time: of a head with 262,144 rows every copy is hundreds of megabytes.
    slices = weight.split(_ROWS_AT_ONCE) if n else (weight,)
    if weight.dtype == torch.bfloat16:
        form = TILED if k % 32 == 0 and HAS_TILES else PAIRED
        shape, dtype = (-(-k // 2), PANEL), torch.int32
    elif any((_bits(part) & 0xFFFF).any() for part in slices):
        form, shape, dtype = FULL, (k, PANEL), torch.float32
    else:
        form, shape, dtype = HALVED, (k, PANEL // 2), torch.int32
    panels = -(-n // PANEL)
    place = _shelf.take(panels * shape[0] * shape[1]).view(panels, *shape)
    start = 0
    for part in slices:
        bits = _bits(functional.pad(part, (0, k % 2 if form >= PAIRED else 0, 0, -len(part) % PANEL)))
        bits = bits.view(-1, PANEL, bits.shape[1]).transpose(1, 2)
        if form == HALVED:
            low, high = bits.chunk(2, dim=2)
            bits = ((low >> 16) & 0xFFFF) | high
        place[start : start + len(bits)] = bits
        start += len(bits)
    return PackedMatrix(n, k, None, place.view(dtype), form)


_ROWS_AT_ONCE = 256 * PANEL


def _bits(weight: Tensor) -> Tensor:
    """Numbers as words: a float32 each, or two neighbours of bfloat16, the left one in the lower half."""
    return weight.contiguous().view(torch.int32)


class _Spill(threading.local):
    """What tiles of a calling thread and its helpers may scribble on."""

    def __init__(self) -> None:
        self.bytes = 0
        self.reserve(2 * f.SPILL)

    def reserve(self, size: int) -> int:
        """The address of at least `size` bytes, on a cache line of their own."""
        if size > self.bytes:
            self.bytes = size
            self.memory = np.empty(size + 64, np.uint8)
            self.start = -(-self.memory.ctypes.data // 64) * 64
        return self.start


_spill = _Spill()


def reserve_scratch(size: int) -> int:
    """The address of at least `size` bytes of the calling thread's, on a cache line of their own; for one call."""
    return _spill.reserve(size)


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
    each = f.SPILL + (rows * (2 * k + 128) // 64 * 64 if w.form >= PAIRED else 0)
    scratch = reserve_scratch(threads * each)
    words = (0, threads, rows, x.data_ptr(), w.address, w.form, w.n, k, out.data_ptr(), scratch, each)
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
        0,
        f.word(frame, 9) + worker * f.word(frame, 10),
    )
