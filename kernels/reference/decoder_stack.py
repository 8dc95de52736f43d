"""A stack of decoder layers in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.decoder_layer import decoder_layer
from kernels.values import LayerCache, LayerWeights, RopeTable, Rows


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
    kept: dict[int, Tensor] = {}
    if -1 in capture:
        kept[-1] = x.clone()
    for index, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
        decoder_layer(x, weights, cache, rope, rows)
        if index in capture:
            kept[index] = x.clone()
    return torch.cat([kept[i] for i in capture], dim=-1) if capture else None
