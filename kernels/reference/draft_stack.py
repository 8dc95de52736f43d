"""The stack of DSpark drafter layers in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.decoder_layer import finish_layer, project_qkv
from kernels.reference.pages import attend, read_prefix
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
    attended = torch.empty_like(q).flatten(1)
    for r, anchor in enumerate(block.anchor_positions.tolist()):
        mine = slice(r * size, (r + 1) * size)
        keys, values = read_prefix(cache, block.page_table[r], anchor)
        keys = torch.cat([keys, k[mine].to(keys.dtype)])  # what the cache would hold
        values = torch.cat([values, v[mine].to(values.dtype)])
        attended[mine] = attend(q[mine], keys, values, None)
    finish_layer(x, attended, weights)
