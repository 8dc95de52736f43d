"""Where the Triton tests run, and caches and tolerances for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.pages import write_slots
from kernels.values import PAGE, LayerCache, cache_shapes
from tests.kernels.layers import Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU: under Triton's interpreter
NEAR = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2**-6}}


def poisoned_cache(shape: Shape, pages: int, dtype: torch.dtype) -> LayerCache:
    """Pages of NaN in the layout of a GPU."""
    _, v_shape = cache_shapes(pages, shape.kv_heads, shape.head_dim, paired=False)
    k, v = (torch.full(v_shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    return LayerCache(k.mT, v)


def filled_cache(shape: Shape, lengths: Sequence[int], table: Tensor, pages: int, dtype: torch.dtype) -> LayerCache:
    """Random keys and values, the same per position, in the first `lengths` slots of each sequence, NaN elsewhere."""
    cache = poisoned_cache(shape, pages, dtype)
    k, v = torch.randn(2, 256, shape.kv_heads, shape.head_dim, generator=seeded(0)).to(DEVICE)
    for row, length in enumerate(lengths):
        positions = torch.arange(length, device=DEVICE)
        write_slots(cache, k[:length], v[:length], table[row, positions // PAGE] * PAGE + positions % PAGE)
    return cache


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {4: torch.int32, 2: torch.int16}[a.dtype.itemsize]
    return a.shape == b.shape and bool((a.contiguous().view(kind) == b.contiguous().view(kind)).all())
