"""RMSNorm, alone or with the residual sum before it. One program a row."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import UNFUSED, narrow, rows_last


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as `kernels.rms_norm.rms_norm`."""
    width = x.shape[-1]
    flat = rows_last(x).reshape(-1, width)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    _launch(flat, flat, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] += delta [T, H] in place; returns rms_norm(x). Same as `kernels.reference.rms_norm.add_rms_norm`."""
    if x.stride(-1) != 1 or x.shape != delta.shape:
        raise ValueError(f"x {tuple(x.shape)} must have contiguous rows, and the shape of delta {tuple(delta.shape)}")
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    _launch(x, rows_last(delta), weight, out, eps, add=True)
    return out


def _launch(x: Tensor, delta: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    if x.shape[0] == 0:
        return
    block = triton.next_power_of_2(x.shape[-1])
    _norm[(x.shape[0],)](
        x, delta, weight, out, x.stride(0), delta.stride(0), x.shape[-1], eps,
        ADD=add, BLOCK=block, num_warps=min(max(block // 512, 1), 16), **UNFUSED,
    )  # fmt: skip


@triton.jit
def _norm(
    x_ptr, delta_ptr, weight_ptr, out_ptr, x_stride, delta_stride, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, inside, 0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * delta_stride + column, inside, 0.0)
        x = narrow(x.to(tl.float32) + delta.to(tl.float32), x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + column, x, inside)
    wide = x.to(tl.float32)
    scale = tl.math.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps))
    # Rounded before the weight: the order of HF's Qwen3.
    out = narrow(wide * scale, x.dtype).to(tl.float32) * tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, narrow(out, out_ptr.dtype.element_ty), inside)
