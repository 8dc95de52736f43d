"""Every kernel's benchmark in one place: what runs, and the bytes and operations that it cannot do without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.decoder_stack import decoder_stack
from kernels.draft_stack import draft_stack
from kernels.filters import SamplingRows, filter_logits_
from kernels.markov_sample import HeadWeights, markov_sample
from kernels.matmul import pack
from kernels.noise import Purpose, exponential_rows
from kernels.rms_norm import rms_norm
from kernels.rope import rope_table
from kernels.select_lengths import select_lengths
from kernels.store_kv import store_context_kv
from kernels.values import PAGE, BlockRows, LayerCache, LayerWeights, RopeTable, Rows, cache_shapes
from kernels.verify import verify
from tests.bench.measure import DEMO

MODES = {"greedy": (0.0, False), "coupled": (1.0, True), "rejection": (1.0, False)}


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    shape: str
    run: Callable[[], object]
    bytes: float  # read and written at least
    flops: float = 0.0
    reset: Callable[[], object] | None = None  # undoes what `run` did to its inputs; not timed


@dataclass(frozen=True)
class Sizes:
    """A model's shapes, and where they are timed."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rank: int
    block: int
    dtype: torch.dtype
    device: torch.device
    requests: tuple[int, ...]
    contexts: tuple[int, ...]
    generator: torch.Generator = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(0))

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def qwen3_8b(device: torch.device) -> Sizes:
    """Qwen3-8B and its published drafter's rank and block."""
    shape = (4096, 12288, 32, 8, 128, 151_936, 256, 7)
    return Sizes(*shape, torch.bfloat16, device, (1, 8, 32, 64), (4096, 16384))


def embedded() -> Sizes:
    """The model in engine/demo, as a CPU runs it."""
    target = json.loads((DEMO / "target" / "config.json").read_text())
    draft = json.loads((DEMO / "dspark" / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    shape = (*(target[name] for name in names), draft["markov_rank"], draft["block_size"])
    return Sizes(*shape, torch.float32, torch.device("cpu"), (1, 8), (256, 2048))


REGISTRY: dict[str, Callable[[Sizes], Iterator[Case]]] = {}


def benchmark(cases: Callable[[Sizes], Iterator[Case]]) -> Callable[[Sizes], Iterator[Case]]:
    """Put a function in the registry under its name, an op's; it yields nothing where the op is no kernel of its own."""
    REGISTRY[cases.__name__.strip("_")] = cases
    return cases


def sampling(sizes: Sizes, rows: int, mode: str, top_k: int = 0, top_p: float = 1.0) -> SamplingRows:
    temperature, coupled = MODES[mode]
    columns = ([temperature] * rows, [top_k] * rows, [top_p] * rows, [0.0] * rows, range(rows), [coupled] * rows)
    return SamplingRows.build(*columns, device=sizes.device)


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


def layer_size(sizes: Sizes) -> int:
    """Weights of a layer's matrices."""
    return sizes.hidden * (sizes.qkv_width + sizes.heads * sizes.head_dim + 3 * sizes.intermediate)


def context(sizes: Sizes, requests: int, length: int) -> tuple[LayerCache, Tensor, RopeTable]:
    """Pages in mixed order for every request, their table, and angles."""
    each = -(-(length + sizes.block + 1) // PAGE)
    k_shape, v_shape = cache_shapes(requests * each, sizes.kv_heads, sizes.head_dim, paired=False)
    v = sizes.normal(*v_shape)
    k = sizes.normal(*k_shape) if sizes.device.type == "cpu" else sizes.normal(*v_shape).mT
    order = torch.randperm(requests * each, generator=sizes.generator, device=sizes.device)
    table = order.view(requests, each)
    return LayerCache(k, v), table, rope_table(length + sizes.block + 1, sizes.head_dim, 1e6, sizes.device)


def ragged(sizes: Sizes, table: Tensor, length: int, each: int) -> Rows:
    """The last `each` rows of every request's `length` positions."""
    positions = torch.arange(length - each, length, device=sizes.device).repeat(len(table))
    owner = torch.arange(len(table), device=sizes.device).repeat_interleave(each)
    return Rows(positions, owner, table[owner, positions // PAGE] * PAGE + positions % PAGE, table)


def kv_bytes(sizes: Sizes, slots: int) -> int:
    return 2 * slots * sizes.kv_heads * sizes.head_dim * sizes.dtype.itemsize


@benchmark
def rms_norm_(sizes: Sizes) -> Iterator[Case]:
    weight = torch.ones(sizes.hidden, dtype=sizes.dtype, device=sizes.device)
    for rows in (sizes.requests[-1], 2048):
        x = sizes.normal(rows, sizes.hidden)
        yield Case(f"{rows} rows", lambda x=x: rms_norm(x, weight, 1e-6), 2 * x.nbytes)


@benchmark
def store_context_kv_(sizes: Sizes, layers: int = 5) -> Iterator[Case]:
    rows = sizes.requests[-1] * (sizes.block + 1)
    caches, places = [], []
    for _ in range(layers):
        cache, table, rope = context(sizes, sizes.requests[-1], 256)
        caches.append(cache)
        places.append(table)
    at = ragged(sizes, places[0], 256, sizes.block + 1)
    kv = sizes.normal(rows, layers * 2 * sizes.kv_heads * sizes.head_dim)
    norms = torch.ones(layers, sizes.head_dim, dtype=sizes.dtype, device=sizes.device)
    arguments = (kv, norms, caches, rope, at.positions, at.slots, 1e-6)
    yield Case(f"{rows} rows, {layers} layers", lambda: store_context_kv(*arguments), 2 * kv.nbytes)


@benchmark
def decoder_stack_(sizes: Sizes) -> Iterator[Case]:
    """One layer."""
    weights, length = layer(sizes), sizes.contexts[0]
    for requests in sizes.requests:
        for each in (1, sizes.block + 1):
            cache, table, rope = context(sizes, requests, length)
            rows, x = ragged(sizes, table, length, each), sizes.normal(requests * each, sizes.hidden)
            yield Case(
                f"{requests} requests, {each} rows each, context {length}",
                lambda x=x, cache=cache, rope=rope, rows=rows: decoder_stack(x, [weights], [cache], rope, rows),
                layer_size(sizes) * sizes.dtype.itemsize + kv_bytes(sizes, requests * length) + 2 * x.nbytes,
                2 * layer_size(sizes) * len(x) + 4 * len(x) * length * sizes.heads * sizes.head_dim,
                reset=lambda x=x: x.normal_(),
            )


@benchmark
def draft_stack_(sizes: Sizes) -> Iterator[Case]:
    """One layer of a drafter."""
    weights, length = layer(sizes), sizes.contexts[0]
    for requests in sizes.requests:
        cache, table, rope = context(sizes, requests, length)
        x = sizes.normal(requests * sizes.block, sizes.hidden)
        block = BlockRows(torch.full((requests,), length, device=sizes.device), table, sizes.block)
        yield Case(
            f"{requests} blocks of {sizes.block}, context {length}",
            lambda x=x, cache=cache, rope=rope, block=block: draft_stack(x, [weights], [cache], rope, block),
            layer_size(sizes) * sizes.dtype.itemsize + kv_bytes(sizes, requests * length) + 2 * x.nbytes,
            2 * layer_size(sizes) * len(x) + 4 * len(x) * length * sizes.heads * sizes.head_dim,
            reset=lambda x=x: x.normal_(),
        )


@benchmark
def exponential_rows_(sizes: Sizes) -> Iterator[Case]:
    rows = torch.arange(sizes.requests[-1], device=sizes.device)
    run = lambda: exponential_rows(rows, rows, Purpose.COUPLED, sizes.vocabulary)
    yield Case(f"{len(rows)} rows", run, 4 * len(rows) * sizes.vocabulary)


@benchmark
def filter_logits(sizes: Sizes) -> Iterator[Case]:
    rows = sizes.requests[-1]
    original = 3 * sizes.normal(rows, sizes.vocabulary, dtype=torch.float32)
    logits = original.clone()
    for name, options in (("temperature alone", (0, 1.0)), ("top-k 50, top-p 0.9", (50, 0.9))):
        how = sampling(sizes, rows, "rejection", *options)
        run = lambda how=how: filter_logits_(logits, how)
        yield Case(f"{rows} rows, {name}", run, 2 * logits.nbytes, reset=lambda: logits.copy_(original))


@benchmark
def select_lengths_(sizes: Sizes) -> Iterator[Case]:
    for rows in (sizes.requests[-1], 256):
        confidence = sizes.normal(rows, sizes.block, dtype=torch.float32).sigmoid()
        weights = torch.ones(rows, device=sizes.device)
        limits = torch.full((rows,), sizes.block, device=sizes.device)
        budget = torch.tensor(2 * rows, device=sizes.device)
        arguments = (confidence, weights, limits, budget)
        run = lambda arguments=arguments: select_lengths(*arguments)
        yield Case(f"{rows} blocks of {sizes.block}", run, 2 * confidence.nbytes)


@benchmark
def verify_(sizes: Sizes) -> Iterator[Case]:
    """Bytes are one pass over the logits; two by rejection, which needs the maximum before the sum."""
    for requests in sizes.requests:
        lines, v = requests * (sizes.block + 1), sizes.vocabulary
        original = 3 * sizes.normal(lines, v, dtype=torch.float32)
        logits = original.clone()
        draft = sizes.normal(requests, sizes.block, v, dtype=torch.float32)
        draft -= draft.amax(-1, keepdim=True)
        rows = torch.arange(requests, device=sizes.device)
        for mode in MODES:
            needed = (draft, draft.logsumexp(-1)) if mode == "rejection" else (None, None)
            arguments = (
                logits, torch.arange(requests + 1, device=sizes.device) * (sizes.block + 1),
                sizes.integers(v, requests, sizes.block), torch.full_like(rows, sizes.block), *needed, rows,
                sampling(sizes, requests, mode), rows, rows,
            )  # fmt: skip
            yield Case(
                f"{requests} requests of {sizes.block}, {mode}",
                lambda arguments=arguments: verify(*arguments),
                logits.nbytes * (2 if mode == "rejection" else 1),
                reset=lambda logits=logits, original=original: logits.copy_(original),
            )


@benchmark
def markov_sample_(sizes: Sizes) -> Iterator[Case]:
    """Bytes are γ times W2 and the base logits; by rejection the corrected logits are written, too."""
    v, r, h = sizes.vocabulary, sizes.rank, 256
    w1, w2 = sizes.normal(v, r, dtype=torch.float32), sizes.normal(v, r).bfloat16()
    extra = {
        "vanilla": {},
        "gated": {"gate_weight": sizes.normal(r, h + r, dtype=torch.float32) * r**-0.5},
        "rnn": {"joint_weight": sizes.normal(3 * r, 2 * r + h, dtype=torch.float32) * r**-0.5},
    }
    biases = {"gated": {"gate_bias": torch.zeros(r, device=sizes.device)}}
    biases["rnn"] = {"joint_bias": torch.zeros(3 * r, device=sizes.device)}
    for requests in sizes.requests:
        base = 3 * sizes.normal(requests, sizes.block, v, dtype=torch.float32)
        hidden, rows = sizes.normal(requests, sizes.block, h, dtype=torch.float32), sizes.integers(v, requests)
        for kind, weights in extra.items():
            head = HeadWeights(kind, w1, w2, **weights, **biases.get(kind, {}))
            for mode in MODES if kind == "vanilla" else ("greedy",):
                arguments = (base, hidden, rows, head, sampling(sizes, requests, mode), rows, rows)
                yield Case(
                    f"{requests} blocks of {sizes.block}, {kind}, {mode}",
                    lambda arguments=arguments: markov_sample(*arguments),
                    sizes.block * w2.nbytes + base.nbytes * (2 if mode == "rejection" else 1),
                    2 * requests * sizes.block * v * r,
                )
