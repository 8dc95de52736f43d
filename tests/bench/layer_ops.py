"""Benchmarks of layers and of what lies between their products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.decoder_stack import decoder_stack
from kernels.draft_stack import draft_stack
from kernels.matmul import pack
from kernels.rms_norm import rms_norm
from kernels.rope import rope_table
from kernels.store_kv import store_context_kv
from kernels.values import PAGE, BlockRows, LayerCache, LayerWeights, RopeTable, Rows, cache_shapes
from tests.bench.registry import Case, Sizes, benchmark


def layer(sizes: Sizes) -> LayerWeights:
    def matrix(n: int, k: int) -> Tensor:
        return sizes.normal(n, k) * k**-0.5

    gains = torch.ones(sizes.hidden, dtype=sizes.dtype, device=sizes.device)
    head_gains = torch.ones(sizes.head_dim, dtype=sizes.dtype, device=sizes.device)
    width = sizes.heads * sizes.head_dim
    return LayerWeights(
        gains, pack(matrix(sizes.qkv_width, sizes.hidden)), head_gains, head_gains, pack(matrix(sizes.hidden, width)),
        gains, pack(matrix(2 * sizes.intermediate, sizes.hidden)), pack(matrix(sizes.hidden, sizes.intermediate)),
        sizes.heads, sizes.kv_heads, sizes.head_dim, 1e-6,
    )  # fmt: skip


def context(sizes: Sizes, requests: int, length: int) -> tuple[LayerCache, Tensor, RopeTable]:
    """Pages in mixed order for every request, their table, and angles."""
    each = -(-(length + sizes.block + 1) // PAGE)
    k_shape, v_shape = cache_shapes(requests * each, sizes.kv_heads, sizes.head_dim, paired=False)
    v = sizes.normal(*v_shape)
    k = sizes.normal(*v_shape).mT if sizes.triton else sizes.normal(*k_shape)
    order = torch.randperm(requests * each, generator=sizes.generator, device=sizes.device)
    table = order.view(requests, each)
    return LayerCache(k, v), table, rope_table(length + sizes.block + 1, sizes.head_dim, 1e6, sizes.device)


def last_rows(sizes: Sizes, table: Tensor, length: int, each: int) -> Rows:
    """The last `each` rows of every request's `length` positions."""
    positions = torch.arange(length - each, length, device=sizes.device).repeat(len(table))
    owner = torch.arange(len(table), device=sizes.device).repeat_interleave(each)
    return Rows(positions, owner, table[owner, positions // PAGE] * PAGE + positions % PAGE, table)


def attention_flops(sizes: Sizes, rows: int, length: int) -> float:
    return 4.0 * rows * length * sizes.heads * sizes.head_dim


@benchmark("rms_norm")
def _(sizes: Sizes) -> Iterator[Case]:
    weight = torch.ones(sizes.hidden, dtype=sizes.dtype, device=sizes.device)
    for rows in (sizes.requests[-1], sizes.chunk):
        x = sizes.normal(rows, sizes.hidden)
        yield Case(f"{rows} rows", lambda x=x: rms_norm(x, weight, 1e-6), 2 * x.nbytes)


@benchmark("add_rms_norm")
def _(sizes: Sizes) -> Iterator[Case]:
    if sizes.triton:
        from kernels.triton.rms_norm import add_rms_norm

        weight = torch.ones(sizes.hidden, dtype=sizes.dtype, device=sizes.device)
        for rows in (sizes.requests[-1], sizes.chunk):
            x, delta = sizes.normal(rows, sizes.hidden), sizes.normal(rows, sizes.hidden)
            run = lambda x=x, delta=delta: add_rms_norm(x, delta, weight, 1e-6)
            yield Case(f"{rows} rows", run, 4 * x.nbytes, reset=lambda x=x: x.zero_())


@benchmark("silu_mul")
def _(sizes: Sizes) -> Iterator[Case]:
    if sizes.triton:
        from kernels.triton.silu_mul import silu_mul

        for rows in (sizes.requests[-1], sizes.chunk):
            x = sizes.normal(rows, 2 * sizes.intermediate)
            yield Case(f"{rows} rows", lambda x=x: silu_mul(x), 1.5 * x.nbytes)


@benchmark("store_kv")
def _(sizes: Sizes) -> Iterator[Case]:
    if sizes.triton:
        from kernels.triton.store_kv import store_kv

        weights = layer(sizes)
        for each in (1, sizes.block + 1):
            cache, table, rope = context(sizes, sizes.requests[-1], 256)
            rows = last_rows(sizes, table, 256, each)
            qkv = sizes.normal(len(rows.positions), sizes.qkv_width)
            arguments = (qkv, weights, cache, rope, rows.positions, rows.slots)
            yield Case(f"{len(qkv)} rows", lambda arguments=arguments: store_kv(*arguments), 2 * qkv.nbytes)


@benchmark("store_context_kv")
def _(sizes: Sizes, layers: int = 5) -> Iterator[Case]:
    caches = []
    for _ in range(layers):
        cache, table, rope = context(sizes, sizes.requests[-1], 256)
        caches.append(cache)
    rows = last_rows(sizes, table, 256, sizes.block + 1)  # every layer's pages are numbered alike
    kv = sizes.normal(len(rows.positions), layers * 2 * sizes.kv_heads * sizes.head_dim)
    norms = torch.ones(layers, sizes.head_dim, dtype=sizes.dtype, device=sizes.device)
    arguments = (kv, norms, caches, rope, rows.positions, rows.slots, 1e-6)
    yield Case(f"{len(kv)} rows, {layers} layers", lambda: store_context_kv(*arguments), 2 * kv.nbytes)


@benchmark("paged_attention")
def _(sizes: Sizes) -> Iterator[Case]:
    if sizes.triton:
        from kernels.triton.paged_attention import paged_attention, tile_rows

        for length in sizes.contexts:
            for requests in sizes.requests:
                cache, table, _ = context(sizes, requests, length)
                for each in (1, sizes.block + 1):
                    rows = last_rows(sizes, table, length, each)
                    q = sizes.normal(requests * each, sizes.heads, sizes.head_dim)
                    tiles = tile_rows(rows, sizes.heads, sizes.kv_heads, sizes.dtype, sizes.head_dim)
                    yield Case(
                        f"{requests} requests, {each} rows each, context {length}",
                        lambda q=q, cache=cache, rows=rows, tiles=tiles: paged_attention(q, cache, rows, tiles),
                        sizes.kv_bytes(requests * length) + 2 * q.nbytes,
                        attention_flops(sizes, len(q), length),
                    )


@benchmark("block_attention")
def _(sizes: Sizes) -> Iterator[Case]:
    if sizes.triton:
        from kernels.triton.paged_attention import block_attention

        for length in sizes.contexts:
            for requests in sizes.requests:
                cache, table, _ = context(sizes, requests, length)
                block = BlockRows(torch.full((requests,), length, device=sizes.device), table, sizes.block)
                q = sizes.normal(requests * sizes.block, sizes.heads, sizes.head_dim)
                k, v = (sizes.normal(len(q), sizes.kv_heads, sizes.head_dim) for _ in range(2))
                arguments = (q, k, v, cache, block)
                yield Case(
                    f"{requests} blocks of {sizes.block}, context {length}",
                    lambda arguments=arguments: block_attention(*arguments),
                    sizes.kv_bytes(requests * (length + sizes.block)) + 2 * q.nbytes,
                    attention_flops(sizes, len(q), length + sizes.block),
                )


@benchmark("decoder_stack")
def _(sizes: Sizes) -> Iterator[Case]:
    """One layer of the target."""
    weights, length = layer(sizes), sizes.contexts[0]
    for requests in sizes.requests:
        cache, table, rope = context(sizes, requests, length)
        for each in (1, sizes.block + 1):
            rows, x = last_rows(sizes, table, length, each), sizes.normal(requests * each, sizes.hidden)
            yield Case(
                f"{requests} requests, {each} rows each, context {length}",
                lambda x=x, cache=cache, rope=rope, rows=rows: decoder_stack(x, [weights], [cache], rope, rows),
                sizes.layer_weights * sizes.dtype.itemsize + sizes.kv_bytes(requests * length) + 2 * x.nbytes,
                2.0 * sizes.layer_weights * len(x) + attention_flops(sizes, len(x), length),
                reset=lambda x=x: x.normal_(),
            )


@benchmark("draft_stack")
def _(sizes: Sizes) -> Iterator[Case]:
    """One layer of a drafter."""
    weights, length = layer(sizes), sizes.contexts[0]
    for requests in sizes.requests:
        cache, table, rope = context(sizes, requests, length)
        x = sizes.normal(requests * sizes.block, sizes.hidden)
        block = BlockRows(torch.full((requests,), length, device=sizes.device), table, sizes.block)
        yield Case(
            f"{requests} blocks of {sizes.block}, context {length}",
            lambda x=x, cache=cache, rope=rope, block=block: draft_stack(x, [weights], [cache], rope, block),
            sizes.layer_weights * sizes.dtype.itemsize + sizes.kv_bytes(requests * length) + 2 * x.nbytes,
            2.0 * sizes.layer_weights * len(x) + attention_flops(sizes, len(x), length + sizes.block),
            reset=lambda x=x: x.normal_(),
        )
