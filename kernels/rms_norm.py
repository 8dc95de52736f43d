"""RMSNorm."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kernels.device import has_kernels
from kernels.jit import entry, native
from kernels.reference import rms_norm as reference
from kernels.simd import add_lanes, fma, load, load_float, never_inline, splat, store, store_float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over its root mean square, times weight [H], contiguous; statistics in float32 (as HF's Qwen3)."""
    if has_kernels(x):
        from kernels.triton import rms_norm as device

        return device.rms_norm(x, weight, eps)
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.is_cpu:
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm_rows(x.numel() // width, x.data_ptr(), weight.data_ptr(), out.data_ptr(), width, eps)
    return out


@native
def norm_row(x, weight, out, width, eps):
    """One row of `width` floats; out may be x. The order of the sum depends on the width alone."""
    never_inline()
    whole = width // 16 * 16
    even, odd = splat(0.0), splat(0.0)
    column = 0
    while column + 32 <= whole:
        a, b = load(x + 4 * column), load(x + 4 * column + 64)
        even, odd = fma(a, a, even), fma(b, b, odd)
        column += 32
    if column < whole:
        a = load(x + 4 * column)
        even = fma(a, a, even)
    total = add_lanes(even + odd)
    for column in range(whole, width):
        total += load_float(x + 4 * column) * load_float(x + 4 * column)
    scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(width) + np.float32(eps)))
    factor = splat(scale)
    for column in range(0, whole, 16):
        store(out + 4 * column, load(x + 4 * column) * factor * load(weight + 4 * column))
    for column in range(whole, width):
        store_float(out + 4 * column, load_float(x + 4 * column) * scale * load_float(weight + 4 * column))


@entry
def _norm_rows(rows, x, weight, out, width, eps):
    for row in range(rows):
        norm_row(x + row * width * 4, weight, out + row * width * 4, width, eps)
