"""A whole stack of decoder layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.device import has_kernels
from kernels.layer_run import run_layers
from kernels.reference import decoder_stack as reference
from kernels.values import LayerCache, LayerStack, LayerWeights, RopeTable, Rows


def decoder_stack(
    x: Tensor,
    layers: Sequence[LayerWeights],
    caches: Sequence[LayerCache],
    rope: RopeTable,
    rows: Rows,
    capture: tuple[int, ...] = (),
) -> Tensor | None:
    """Run x [T, H] through the layers in place -> the captured features [T, len(capture) · H], or None.

    Capture id −1 is the input of layer 0, id i the output of layer i.
    """
    if has_kernels(x) and all(layer.plain for layer in layers):  # other layers are left to plain torch
        from kernels.triton import decoder_stack as device

        return device.decoder_stack(x, layers, caches, rope, rows, capture)
    if x.is_cpu and x.dtype == torch.float32:
        stack = LayerStack(tuple(layers), tuple(caches))
        if stack.native:
            return run_layers(x, stack, rope, rows, capture)
    return reference.decoder_stack(x, layers, caches, rope, rows, capture)
