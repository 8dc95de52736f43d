"""Random layers, caches and batches for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.matmul import pack
from kernels.values import PAGE, LayerCache, LayerWeights, Rows, cache_shapes


@dataclass(frozen=True)
class Shape:
    hidden: int = 64
    intermediate: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32


def random_layer(
    shape: Shape,
    generator: torch.Generator,
    bias: bool = False,
    sixteen_bit: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LayerWeights:
    """Weights that keep activations near 1; with `sixteen_bit` every matrix entry fits bfloat16."""

    def matrix(n: int, k: int) -> Tensor:
        weight = torch.randn(n, k, generator=generator) * k**-0.5
        return (weight.bfloat16().float() if sixteen_bit else weight).to(dtype)

    def gains(n: int) -> Tensor:
        return 0.5 + torch.rand(n, generator=generator)

    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return LayerWeights(
        input_norm=gains(shape.hidden),
        qkv=pack(matrix(width, shape.hidden)),
        q_norm=gains(shape.head_dim),
        k_norm=gains(shape.head_dim),
        o=pack(matrix(shape.hidden, shape.heads * shape.head_dim)),
        post_norm=gains(shape.hidden),
        gate_up=pack(matrix(2 * shape.intermediate, shape.hidden)),
        down=pack(matrix(shape.hidden, shape.intermediate)),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        eps=1e-6,
        qkv_bias=0.1 * torch.randn(width, generator=generator) if bias else None,
    )


def poisoned_cache(shape: Shape, pages: int, dtype: torch.dtype = torch.float32) -> LayerCache:
    """Pages that hold nothing but NaN."""
    shapes = cache_shapes(pages, shape.kv_heads, shape.head_dim, paired=dtype == torch.bfloat16)
    return LayerCache(*(torch.full(size, torch.nan, dtype=dtype) for size in shapes))


def copied(cache: LayerCache) -> LayerCache:
    return LayerCache(cache.k.clone(), cache.v.clone())


def page_table(lengths: Sequence[int], pages: int, generator: torch.Generator) -> Tensor:
    """Distinct random pages for sequences that will grow to `lengths`, −1 padded."""
    order = torch.randperm(pages, generator=generator).tolist()
    counts = [(length + PAGE - 1) // PAGE for length in lengths]
    table = torch.full((len(lengths), max(counts)), -1)
    for row, count in enumerate(counts):
        for column in range(count):
            table[row, column] = order.pop()
    return table


def ragged_rows(spans: Sequence[tuple[int, int]], table: Tensor) -> Rows:
    """Rows of sequence i at positions start … stop−1, spans[i] = (start, stop)."""
    positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
    counts = torch.tensor([stop - start for start, stop in spans])
    sequence = torch.repeat_interleave(torch.arange(len(spans)), counts)
    slots = table[sequence, positions // PAGE] * PAGE + positions % PAGE
    return Rows(positions, sequence, slots, table)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.view(torch.int32) == b.view(torch.int32)).all())
