"""The gate of SwiGLU."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import UNFUSED, narrow, rows_last

BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of gate_up [T, 2 I], gate first -> [T, I]; same as `kernels.reference.silu_mul.silu_mul`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = rows_last(gate_up)
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _silu_mul[grid](gate_up, out, gate_up.stride(0), width, BLOCK_I=BLOCK, num_warps=4, **UNFUSED)
    return out


@triton.jit
def _silu_mul(gate_up, out, stride, width, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, inside, 0.0).to(tl.float32)
    activated = narrow(gate / (1.0 + tl.exp(-gate)), out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, narrow(activated * up, out.dtype.element_ty), inside)
