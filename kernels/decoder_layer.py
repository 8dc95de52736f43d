"""One decoder layer over paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.device import has_kernels
from kernels.layer_run import run_layers
from kernels.reference import decoder_layer as reference
from kernels.values import LayerCache, LayerStack, LayerWeights, RopeTable, Rows

__all__ = ["LayerCache", "LayerWeights", "RopeTable", "Rows", "decoder_layer"]


def decoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cache: LayerCache,
    rope: RopeTable,
    rows: Rows,
    qkv_start: Tensor | None = None,
) -> None:
    """Run the layer on x [T, H] in place; store the rows' keys and values, then attend causally.

    Each row sees positions 0 … its own: all earlier ones lie in the cache or among this batch's rows.

    Args:
        qkv_start: [T, (heads + 2 kv_heads) · head_dim], what is added to each row's projected q, k and v: the part of
            a projection whose input is wider than x (Eagle3). The layer must have no `qkv_bias` then.

    Raises:
        ValueError: tensors that do not fit together.
    """
    if qkv_start is not None and (qkv_start.shape != (x.shape[0], weights.qkv.n) or weights.qkv_bias is not None):
        raise ValueError("qkv_start must hold a row of q, k and v for each row of x, and replaces qkv_bias")
    if has_kernels(x) and weights.plain:  # other layers are left to plain torch
        from kernels.triton import decoder_stack as device

        device.decoder_stack(x, (weights,), (cache,), rope, rows, qkv_start=qkv_start)
        return
    if x.is_cpu and x.dtype == torch.float32 and (qkv_start is None or qkv_start.dtype == x.dtype):
        stack = LayerStack((weights,), (cache,))
        if stack.native:
            run_layers(x, stack, rope, rows, qkv_start=qkv_start)
            return
    reference.decoder_layer(x, weights, cache, rope, rows, qkv_start)
