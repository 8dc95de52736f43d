"""The stack of DSpark drafter layers in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.decoder_layer import finish_layer, project_qkv
from kernels.reference.pages import block_attention
from kernels.values import BlockRows, LayerCache, LayerWeights, RopeTable


def draft_stack(
    x: Tensor, layers: Sequence[LayerWeights], caches: Sequence[LayerCache], rope: RopeTable, block: BlockRows
) -> None:
    """Run the layers on the block slots x [R·γ, H] in place.

    A slot sees the context, positions 0 … anchor−1 in the cache, and all γ slots of its own block, both ways
    (DSpark, section 3). The block's own keys and values are not stored.
    """
    for layer, cache in zip(layers, caches, strict=True):
        _layer(x, layer, cache, rope, block)


def _layer(x: Tensor, weights: LayerWeights, cache: LayerCache, rope: RopeTable, block: BlockRows) -> None:
    size = block.block_size
    offsets = torch.arange(size, device=x.device)
    positions = (block.anchor_positions[:, None] + offsets).flatten()
    q, k, v = project_qkv(x, weights, rope, positions)
    finish_layer(x, block_attention(q, k, v, cache, block), weights)
