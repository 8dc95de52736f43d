"""What a drafter checks before it attaches to a target: sizes, feature layers, and copies of the target's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.errors import LoadError
from engine.models.layers import Geometry
from engine.models.loader import Checkpoint, setting
from engine.models.qwen3 import Qwen3Model


def check_sizes(geometry: Geometry, target: Qwen3Model, directory: Path) -> None:
    """The drafter shares the target's embedding and lm_head, so both sizes must agree.

    Raises:
        LoadError: naming the size.
    """
    for name in ("vocab_size", "hidden_size"):
        mine, theirs = getattr(geometry, name), getattr(target.geometry, name)
        if mine != theirs:
            raise LoadError(
                f"{directory / 'config.json'}: {name} is {mine}, the target's is {theirs}: made for another target"
            )


def read_feature_layers(config: dict[str, Any], target: Qwen3Model, directory: Path) -> tuple[int, ...]:
    """`target_layer_ids`: target layers, counted from 0, whose outputs are concatenated; −1 is the embedding.

    Raises:
        LoadError: empty, unordered, or naming a layer that cannot be one.
    """
    source, last = directory / "config.json", target.geometry.layers - 2
    ids = setting(config, "target_layer_ids", list, directory)
    if not ids or any(not isinstance(i, int) or not -1 <= i <= last for i in ids):
        raise LoadError(f"{source}: target_layer_ids {ids} must lie in −1 … {last}; the final layer's output is normed")
    if ids != sorted(set(ids)):
        raise LoadError(f"{source}: target_layer_ids {ids} must increase")
    return tuple(ids)


def read_block_size(config: dict[str, Any], directory: Path, default: int | None = None) -> int:
    """`block_size`: γ, the tokens a proposal holds.

    Raises:
        LoadError: missing without a default, or not positive.
    """
    size: int = setting(config, "block_size", int, directory, default)
    if size < 1:
        raise LoadError(f"{directory / 'config.json'}: block_size must be positive, got {size}")
    return size


def check_copies(checkpoint: Checkpoint, target: Qwen3Model, names: tuple[str, ...]) -> None:
    """Copies of the target's tensors are welcome where they are equal; `names` are those that may be copies.

    Raises:
        LoadError: naming the tensor that differs.
    """
    owned = {"embed_tokens.weight": target.embedding, "lm_head.weight": target.head_weight}
    for name in names:
        theirs = owned[name]
        if name in checkpoint:
            mine = checkpoint.take(name, tuple(theirs.shape), target.dtype)
            if not torch.equal(mine.to(theirs.device), theirs):
                raise LoadError(f"{checkpoint.directory}: tensor {name} differs from the target's; use its own")
