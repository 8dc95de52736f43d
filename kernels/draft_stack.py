"""The stack of DSpark drafter layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.device import has_kernels
from kernels.layer_run import run_layers
from kernels.reference import draft_stack as reference
from kernels.values import BlockRows, LayerCache, LayerStack, LayerWeights, RopeTable

__all__ = ["BlockRows", "draft_stack"]


def draft_stack(
    x: Tensor, layers: Sequence[LayerWeights], caches: Sequence[LayerCache], rope: RopeTable, block: BlockRows
) -> None:
    """Run the layers on the block slots x [R·γ, H] in place.

    A slot sees the context, positions 0 … anchor−1 in the cache, and all γ slots of its own block, both ways
    (DSpark, section 3). The block's own keys and values are not stored.
    """
    if has_kernels(x) and all(layer.plain for layer in layers):  # other layers are left to plain torch
        from kernels.triton import decoder_stack as device

        device.draft_stack(x, layers, caches, rope, block)
        return
    if x.is_cpu and x.dtype == torch.float32:
        stack = LayerStack(tuple(layers), tuple(caches))
        if stack.native:
            run_layers(x, stack, rope, block)
            return
    reference.draft_stack(x, layers, caches, rope, block)
