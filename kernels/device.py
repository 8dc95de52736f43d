"""Which tensors the Triton kernels take."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x lies on a GPU.

    Raises:
        RuntimeError: it does, but Triton is missing.
    """
    if x.is_cuda and not _triton():
        raise RuntimeError("tensors on a GPU need Triton: pip install -r requirements/gpu.txt")
    return x.is_cuda


def has_kernels(x: torch.Tensor) -> bool:
    """The same, in a dtype that the kernels take; others are left to plain torch."""
    return x.is_cuda and x.dtype in DTYPES and on_gpu(x)


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
