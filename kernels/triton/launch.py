"""What all launches share."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Nothing is fused into multiply-adds unless the source says so: noise is defined by correctly rounded single
# operations, and two kernels that must agree to the bit would otherwise be contracted differently.
UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def dot(a, b, sums):
    """sums + a @ b, float32 sums. float32 factors are multiplied as three TF32 products, nearly as precise."""
    if INTERPRETED:  # the interpreter multiplies the bits of a bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="tf32x3")


@triton.jit
def narrow(x, kind: tl.constexpr):
    """float32 x in `kind`, to nearest even."""
    if INTERPRETED and kind == tl.bfloat16:  # the interpreter would cut the lower half off
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(kind, bitcast=True)
        return tl.where(x == x, nearest, x.to(kind))
    return x.to(kind)


def rows_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
