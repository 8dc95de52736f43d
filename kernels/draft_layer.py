"""One DSpark drafter layer."""

from __future__ import annotations

from torch import Tensor

from kernels.layer_run import is_native, run_layers
from kernels.reference import draft_layer as reference
from kernels.values import BlockRows, LayerCache, LayerWeights, RopeTable

__all__ = ["BlockRows", "draft_layer"]


def draft_layer(x: Tensor, weights: LayerWeights, cache: LayerCache, rope: RopeTable, block: BlockRows) -> None:
    """Run the layer on the block slots x [R·γ, H] in place.

    A slot sees the context, positions 0 … anchor−1 in the cache, and all γ slots of its own block, both ways
    (DSpark, section 3). The block's own keys and values are not stored.
    """
    if is_native(x, (weights,), (cache,)):
        run_layers(x, (weights,), (cache,), rope, block)
    else:
        reference.draft_layer(x, weights, cache, rope, block)
