"""One decoder layer over paged keys and values."""

from __future__ import annotations

from torch import Tensor

from kernels.layer_run import is_native, run_layers
from kernels.reference import decoder_layer as reference
from kernels.values import LayerCache, LayerWeights, RopeTable, Rows

__all__ = ["LayerCache", "LayerWeights", "RopeTable", "Rows", "decoder_layer"]


def decoder_layer(x: Tensor, weights: LayerWeights, cache: LayerCache, rope: RopeTable, rows: Rows) -> None:
    """Run the layer on x [T, H] in place; store the rows' keys and values, then attend causally.

    Each row sees positions 0 … its own: all earlier ones lie in the cache or among this batch's rows.
    """
    if is_native(x, (weights,), (cache,)):
        run_layers(x, (weights,), (cache,), rope, rows)
    else:
        reference.decoder_layer(x, weights, cache, rope, rows)
