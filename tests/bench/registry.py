"""Every op's benchmark under its name: what runs, and the bytes and operations that it cannot do without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.bench.measure import DEMO


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
    chunk: int  # rows of a prefill
    triton: bool  # whether the parts of a layer are kernels of their own
    generator: torch.Generator = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(0))

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights in a layer's matrices."""
        return self.hidden * (self.qkv_width + self.heads * self.head_dim + 3 * self.intermediate)

    def kv_bytes(self, slots: int) -> int:
        """Bytes of the keys and values of one layer in `slots` slots."""
        return 2 * slots * self.kv_heads * self.head_dim * self.dtype.itemsize

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def qwen3_8b(device: torch.device) -> Sizes:
    """Qwen3-8B and its published drafter's rank and block."""
    shape = (4096, 12288, 32, 8, 128, 151_936, 256, 7)
    return Sizes(*shape, torch.bfloat16, device, (1, 8, 32, 64), (4096, 16384), 2048, triton=True)


def embedded() -> Sizes:
    """The model in engine/demo, as a CPU runs it."""
    target = json.loads((DEMO / "target" / "config.json").read_text())
    draft = json.loads((DEMO / "dspark" / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    shape = (*(target[name] for name in names), draft["markov_rank"], draft["block_size"])
    return Sizes(*shape, torch.float32, torch.device("cpu"), (1, 8), (256, 1024), 512, triton=False)


Benchmark = Callable[[Sizes], Iterator[Case]]
REGISTRY: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Put a function in the registry; it yields nothing where the op is no kernel of its own."""

    def enter(cases: Benchmark) -> Benchmark:
        assert name not in REGISTRY, name
        REGISTRY[name] = cases
        return cases

    return enter
