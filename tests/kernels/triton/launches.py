"""One call of every wrapper at the shapes of Qwen3-8B, its drafter, and their sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.filters import SamplingRows
from kernels.markov_sample import HeadWeights
from kernels.matmul import PackedMatrix
from kernels.rope import rope_table
from kernels.triton import (
    filters,
    markov_sample,
    noise,
    paged_attention,
    rms_norm,
    select_lengths,
    silu_mul,
    store_kv,
    verify,
)
from kernels.values import PAGE, BlockRows, LayerCache, LayerWeights, Rows

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, RANK, BLOCK = 4096, 32, 8, 128, 12288, 151936, 256, 7
BFLOAT = torch.bfloat16


def layer(dtype: torch.dtype) -> LayerWeights:
    """A layer whose matrices are views of one number: only their shapes matter here."""

    def matrix(n: int, k: int) -> PackedMatrix:
        return PackedMatrix(n, k, torch.zeros((), dtype=dtype).expand(n, k), None)

    gains, head_gains = torch.ones(HIDDEN, dtype=dtype), torch.ones(HEAD_DIM, dtype=dtype)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return LayerWeights(
        gains, matrix(width, HIDDEN), head_gains, head_gains, matrix(HIDDEN, HEADS * HEAD_DIM), gains,
        matrix(2 * INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE), HEADS, KV_HEADS, HEAD_DIM, 1e-6,
    )  # fmt: skip


def every_launch(launches: list[Any]) -> list[str]:
    """Call the wrappers with launches caught; a label for each launch."""
    labels: list[str] = []

    def call(label: str, wrapper: Callable[..., Any], *arguments: Any) -> Any:
        result = wrapper(*arguments)
        labels.extend([label] * (len(launches) - len(labels)))
        return result

    for dtype in (BFLOAT, torch.float32):
        label = str(dtype).removeprefix("torch.")
        _layers(lambda *arguments, label=label: call(label, *arguments), dtype)
    _sampling(call)
    return labels


def _layers(call: Callable[..., Any], dtype: torch.dtype) -> None:
    weights, rope = layer(dtype), rope_table(64, HEAD_DIM, 1e6)
    rows, pages = 16, 2048
    x = torch.zeros(rows, HIDDEN, dtype=dtype)
    call(rms_norm.rms_norm, x, weights.input_norm, 1e-6)
    call(rms_norm.add_rms_norm, x, x, weights.input_norm, 1e-6)
    call(silu_mul.silu_mul, torch.zeros(rows, 2 * INTERMEDIATE, dtype=dtype))
    v = torch.zeros((), dtype=dtype).expand(4, KV_HEADS, PAGE, HEAD_DIM).contiguous()
    cache = LayerCache(v.clone().mT, v)
    table = torch.zeros(2, pages, dtype=torch.int64)
    positions = torch.arange(rows)
    ragged = Rows(positions, positions // 8, positions, table)
    qkv = torch.zeros(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    q = call(store_kv.store_kv, qkv, weights, cache, rope, positions, positions)
    kv = torch.zeros(rows, 2 * KV_HEADS * HEAD_DIM, dtype=dtype)
    norms = torch.ones(1, HEAD_DIM, dtype=dtype)
    call(store_kv.store_context_kv, kv, norms, [cache], rope, positions, positions, 1e-6)
    tiles = paged_attention.tile_rows(ragged, HEADS, KV_HEADS, dtype, HEAD_DIM)
    call(paged_attention.paged_attention, q, cache, ragged, tiles)
    short = Rows(positions, positions // 8, positions, table[:, :32])
    call(paged_attention.paged_attention, q, cache, short, tiles)
    block = BlockRows(torch.zeros(2, dtype=torch.int64), table, 8)
    k = torch.zeros(rows, KV_HEADS, HEAD_DIM, dtype=dtype)
    call(paged_attention.block_attention, q, k, k, cache, block)


def _sampling(call: Callable[..., Any]) -> None:
    count = 2
    zeros = torch.zeros(count, dtype=torch.int64)
    sampling = SamplingRows.build([1.0] * 2, [20] * 2, [0.9] * 2, [0.1] * 2, [0] * 2, [False] * 2)
    logits = torch.zeros(count, VOCABULARY)
    call("", noise.uniforms, zeros, zeros, zeros, 0)
    call("", noise.exponential_rows, zeros, zeros, 0, VOCABULARY)
    call("", filters.filter_logits_, logits, sampling)
    many = 256
    limits = torch.full((many,), BLOCK)
    call("", select_lengths.select_lengths, torch.zeros(many, BLOCK), torch.ones(many), limits, torch.tensor(many))
    drafted = torch.zeros(count, BLOCK, dtype=torch.int64)
    draft_logits = torch.zeros(count, BLOCK, VOCABULARY)
    log_z = torch.zeros(count, BLOCK)
    offsets = torch.arange(count + 1)
    for kind in (torch.float32, BFLOAT):
        call(
            str(kind).removeprefix("torch."), verify.verify, logits.to(kind), offsets, drafted, zeros, draft_logits,
            log_z, zeros, sampling, zeros, zeros,
        )  # fmt: skip
    for kind in (BFLOAT, torch.float32):
        w2 = torch.zeros((), dtype=kind).expand(VOCABULARY, RANK)
        head = HeadWeights("vanilla", torch.zeros(()).expand(VOCABULARY, RANK), w2)
        base, hidden = torch.zeros(count, 1, VOCABULARY), torch.zeros(count, 1, 8)
        call(
            f"W2 {str(kind).removeprefix('torch.')}", markov_sample.markov_sample, base, hidden, zeros, head, sampling,
            zeros, zeros,
        )  # fmt: skip
