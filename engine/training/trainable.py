"""What a drafter must offer to be trained, what a training step hands to it, and the drafters by name.

Knows no loop, no files and no particular drafter. Shapes: B sequences of T positions, D the target's
width, n feature layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from engine.training.gemma3 import Target
from engine.training.model import ModelConfig
from engine.training.sources import Stream

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, weight), detached, same shape: scalar or [positions]


@dataclass(frozen=True)
class Shared:
    """What a drafter borrows from the target, frozen and never saved with it."""

    config: ModelConfig
    embedding: Tensor  # [V, D]
    head: Tensor  # [V, D]: logits are head · hidden; the embedding itself where the target ties them
    draft_ids: Tensor | None = None  # [N] target ids of the run's reduced draft vocabulary; None: all may be drafted
    scale: float = 1.0  # of the embedding's rows, as they enter the target's first layer and a drafter's

    def embed(self, tokens: Tensor) -> Tensor:
        """The embedding's rows [..., D] as layers read them, for tokens [...]."""
        rows = F.embedding(tokens, self.embedding).float()
        return rows if self.scale == 1.0 else rows * self.scale


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step.

    The target's outputs at position p follow from tokens 0 … p. `loss_mask[b, p]` says whether token p may be
    asked for (False: prompt, padding, first token after a document's end); a drafter's position that predicts
    token p counts only if it and everything that the same block predicts before it may be asked for.
    """

    tokens: Tensor  # [B, T] int64
    features: Tensor  # [B, T, n·D]: outputs of the drafter's feature layers, in their order
    hidden: Tensor  # [B, T, D]: the target's final hidden states, normed
    loss_mask: Tensor  # [B, T] bool
    draws: Tensor  # [B, T] float32 uniform in [0, 1): the only randomness a loss may use
    shared: Shared
    # Of the target's whole distribution after each position, where the run knows them (see `labels`):
    log_z: Tensor | None = None  # [B, T] float32
    best: Tensor | None = None  # [B, T] int64 the most likely token

    def total(self, value: Tensor) -> Tensor:
        """The detached sum of `value` over all workers: what a weighted mean divides by.

        A loss is Σ w·ℓ of this worker's rows over `total(Σ w)`; the loop *adds* the workers' gradients, so
        that any number of workers takes the same step.
        """
        value = value.detach().clone()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(value)
        return value


def chunks(rows: int, vocabulary: int, budget: int = 2**24) -> Iterator[slice]:
    """Slices of `rows` rows, each with at most `budget` values of vocabulary width."""
    step = max(1, budget // max(1, vocabulary))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


class Trainable(Protocol):
    """A drafter under training: an `nn.Module` whose parameters are all its own.

    Built as `cls(options, shared)`, where `options` is an instance of `cls.Options`, a frozen dataclass
    whose fields (numbers, strings, booleans, tuples of them, further such dataclasses) are the `[model]` table of the
    configuration, defaults included.
    """

    Options: ClassVar[type]
    feature_layers: tuple[int, ...]  # target layers whose outputs `Batch.features` holds; −1: the embedding

    def begin(self, target: Target, streams: Sequence[Stream], shares: Sequence[float]) -> None:
        """Set starting weights before a run's first step; the same for all workers.

        Args:
            streams, shares: what will be trained on, and each one's share of the rows.
        """
        ...

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The scalar to descend and what to report.

        `tau` among the metrics is the expected accepted length at temperature 1 with the bonus token.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write config.json and model.safetensors as the engine serves them."""
        ...

    def quicken(self) -> None:
        """Compile what pays, when the run asks for it."""
        ...


Drafter = TypeVar("Drafter", bound=type[nn.Module])
_REGISTRY: dict[str, type[Any]] = {}
# Where a name is registered; imported on first use.
_MODULES = {"dspark": "dspark", "dflash": "dspark", "eagle3": "eagle3", "mtp": "mtp"}


def register(name: str) -> Callable[[Drafter], Drafter]:
    """Class decorator: `--drafter name` trains this class."""

    def enter(cls: Drafter) -> Drafter:
        _REGISTRY[name] = cls
        return cls

    return enter


def names() -> list[str]:
    """Every drafter that can be trained."""
    return sorted({*_MODULES, *_REGISTRY})


def find(name: str) -> type[Any]:
    """The class registered under `name`: a Trainable.

    Raises:
        KeyError: no drafter of that name; the message lists them.
    """
    if name not in _REGISTRY and name in _MODULES:
        from importlib import import_module

        import_module(f"engine.training.{_MODULES[name]}")
    if name not in _REGISTRY:
        raise KeyError(f"no drafter {name!r}; there are {', '.join(names())}")
    return _REGISTRY[name]
