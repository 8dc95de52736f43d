"""Benchmarks of drafting's and verification's sampling, and of the choice of lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.filters import SamplingRows, filter_logits_
from kernels.markov_sample import HeadWeights, markov_sample
from kernels.noise import Purpose, exponential_rows
from kernels.select_lengths import select_lengths
from kernels.verify import verify
from tests.bench.registry import Case, Sizes, benchmark

MODES = {"greedy": (0.0, False), "coupled": (1.0, True), "rejection": (1.0, False)}


def sampling(sizes: Sizes, seeds: Sequence[int], mode: str, top_k: int = 0, top_p: float = 1.0) -> SamplingRows:
    (temperature, coupled), rows = MODES[mode], len(seeds)
    columns = ([temperature] * rows, [top_k] * rows, [top_p] * rows, [0.0] * rows, seeds, [coupled] * rows)
    return SamplingRows.build(*columns, device=sizes.device)


@benchmark("exponential_rows")
def _(sizes: Sizes) -> Iterator[Case]:
    rows = torch.arange(sizes.requests[-1], device=sizes.device)
    run = lambda: exponential_rows(rows, rows, Purpose.COUPLED, sizes.vocabulary)
    yield Case(f"{len(rows)} rows", run, 4 * len(rows) * sizes.vocabulary)


@benchmark("filter_logits")
def _(sizes: Sizes) -> Iterator[Case]:
    rows = sizes.requests[-1]
    original = 3 * sizes.normal(rows, sizes.vocabulary, dtype=torch.float32)
    logits = original.clone()
    for name, options in (("temperature alone", (0, 1.0)), ("top-k 50, top-p 0.9", (50, 0.9))):
        how = sampling(sizes, range(rows), "rejection", *options)
        run = lambda how=how: filter_logits_(logits, how)
        yield Case(f"{rows} rows, {name}", run, 2 * logits.nbytes, reset=lambda: logits.copy_(original))


@benchmark("select_lengths")
def _(sizes: Sizes) -> Iterator[Case]:
    for rows in (sizes.requests[-1], 256):
        confidence = sizes.normal(rows, sizes.block, dtype=torch.float32).sigmoid()
        weights = torch.ones(rows, device=sizes.device)
        limits = torch.full((rows,), sizes.block, device=sizes.device)
        budget = torch.tensor(2 * rows, device=sizes.device)
        arguments = (confidence, weights, limits, budget)
        run = lambda arguments=arguments: select_lengths(*arguments)
        yield Case(f"{rows} blocks of {sizes.block}", run, 2 * confidence.nbytes)


@benchmark("verify")
def _(sizes: Sizes) -> Iterator[Case]:
    """Everything is accepted. Bytes are one pass over the logits; by rejection two, for the maximum and the sum."""
    for requests in sizes.requests:
        each, v = sizes.block + 1, sizes.vocabulary
        original = 3 * sizes.normal(requests * each, v, dtype=torch.float32)
        logits = original.clone()
        same = original.view(requests, each, v)[:, :-1]
        same = same - same.amax(-1, keepdim=True)  # drafted from the target's own distribution
        rows = torch.arange(requests, device=sizes.device)
        for mode in MODES:
            tokens = target_tokens(sizes, original.clone(), requests, "greedy" if mode == "rejection" else mode)
            needed = (same, same.logsumexp(-1)) if mode == "rejection" else (None, None)
            arguments = (
                logits, torch.arange(requests + 1, device=sizes.device) * each, tokens[:, :-1].contiguous(),
                torch.full_like(rows, sizes.block), *needed, rows, sampling(sizes, range(requests), mode), rows, rows,
            )  # fmt: skip
            yield Case(
                f"{requests} requests of {sizes.block}, {mode}",
                lambda arguments=arguments: verify(*arguments),
                logits.nbytes * (2 if mode == "rejection" else 1),
                reset=lambda logits=logits, original=original: logits.copy_(original),
            )


def target_tokens(sizes: Sizes, logits: Tensor, requests: int, mode: str) -> Tensor:
    """What the target picks at every position, [requests, γ + 1]: each line verified as a request without a draft."""
    each = sizes.block + 1
    lines = torch.arange(requests * each, device=sizes.device)
    none = torch.zeros_like(lines)
    rules = sampling(sizes, (lines // each).tolist(), mode)
    drafted = torch.zeros((len(lines), sizes.block), dtype=torch.int64, device=sizes.device)
    offsets = torch.arange(len(lines) + 1, device=sizes.device)
    positions = lines // each + lines % each
    return verify(logits, offsets, drafted, none, None, None, none, rules, positions, none)[1].view(requests, each)


@benchmark("markov_sample")
def _(sizes: Sizes) -> Iterator[Case]:
    """Bytes are γ times W2 and the base logits; by rejection the corrected logits are written, too."""
    v, r, h = sizes.vocabulary, sizes.rank, 256
    w1, w2 = sizes.normal(v, r, dtype=torch.float32), sizes.normal(v, r).bfloat16()
    extra: dict[str, dict[str, Tensor]] = {
        "vanilla": {},
        "gated": {"gate_weight": sizes.normal(r, h + r, dtype=torch.float32) * r**-0.5},
        "rnn": {"joint_weight": sizes.normal(3 * r, 2 * r + h, dtype=torch.float32) * r**-0.5},
    }
    extra["gated"]["gate_bias"] = torch.zeros(r, device=sizes.device)
    extra["rnn"]["joint_bias"] = torch.zeros(3 * r, device=sizes.device)
    for requests in sizes.requests:
        base = 3 * sizes.normal(requests, sizes.block, v, dtype=torch.float32)
        hidden, rows = sizes.normal(requests, sizes.block, h, dtype=torch.float32), sizes.integers(v, requests)
        for kind, weights in extra.items():
            head = HeadWeights(kind, w1, w2, **weights)
            for mode in MODES if kind == "vanilla" else ("greedy",):
                arguments = (base, hidden, rows, head, sampling(sizes, range(requests), mode), rows, rows)
                yield Case(
                    f"{requests} blocks of {sizes.block}, {kind}, {mode}",
                    lambda arguments=arguments: markov_sample(*arguments),
                    sizes.block * w2.nbytes + base.nbytes * (2 if mode == "rejection" else 1),
                    2.0 * requests * sizes.block * v * r,
                )
