"""What a drafter checks before it attaches to a target: sizes, feature layers, draft vocabulary, copies of its tensors.

A reduced draft vocabulary is optional (`draft_vocab_size`, as EAGLE-3 publishes it): `d2t` [draft vocabulary] holds
target id − draft id, and `t2d` [V], which may be left out, marks the target's ids that have one. lm_head then has a row
for each draft id: its own, or the target's where the checkpoint has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.errors import LoadError
from engine.models.decoder import DecoderModel
from engine.models.layers import Geometry
from engine.models.loader import Checkpoint, setting
from kernels.matmul import PackedMatrix, pack


def check_sizes(geometry: Geometry, target: DecoderModel, directory: Path) -> None:
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


def read_feature_layers(config: dict[str, Any], target: DecoderModel, directory: Path) -> tuple[int, ...]:
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


def check_copies(checkpoint: Checkpoint, target: DecoderModel, names: tuple[str, ...]) -> None:
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


def read_head(
    checkpoint: Checkpoint, config: dict[str, Any], target: DecoderModel
) -> tuple[PackedMatrix, torch.Tensor | None]:
    """lm_head, and the target ids of a reduced draft vocabulary in draft order (None for all ids).

    Raises:
        LoadError: a map or size that cannot be, or a copy that differs; names the tensor or key.
    """
    directory, vocabulary = checkpoint.directory, target.geometry.vocab_size
    size = config.get("draft_vocab_size")
    if size is None or size == vocabulary:
        check_copies(checkpoint, target, ("embed_tokens.weight", "lm_head.weight"))
        return target.head, None
    setting(config, "draft_vocab_size", int, directory)
    if not 0 < size < vocabulary:
        raise LoadError(f"{directory / 'config.json'}: draft_vocab_size {size} must lie in 1 … {vocabulary}")
    check_copies(checkpoint, target, ("embed_tokens.weight",))
    ids = checkpoint.take_integers("d2t", (size,)) + torch.arange(size)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) < size:
        raise LoadError(f"{directory}: tensor d2t names an id twice, or one outside the vocabulary")
    if "t2d" in checkpoint:
        marked = checkpoint.take_integers("t2d", (vocabulary,)).nonzero().flatten()
        if not torch.equal(marked, ids.sort().values):
            raise LoadError(f"{directory}: tensors d2t and t2d disagree about the draft vocabulary")
    ids = ids.to(target.device)
    own = target.head_weight.index_select(0, ids)
    if "lm_head.weight" in checkpoint:  # trained with its vocabulary: need not be rows of the target's
        own = checkpoint.take("lm_head.weight", (size, target.geometry.hidden_size), target.dtype).to(target.device)
    return pack(own), ids
