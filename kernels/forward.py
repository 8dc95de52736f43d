"""A whole forward pass in one call: embedding, layers, last norm, vocabulary head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decoder_stack import decoder_stack
from kernels.draft_stack import draft_stack
from kernels.embedding import embedding
from kernels.layer_run import run_model
from kernels.matmul import matmul
from kernels.rms_norm import rms_norm
from kernels.values import BlockRows, Ends, LayerStack, RopeTable, Rows

__all__ = ["BlockRows", "Ends", "Forward", "LayerStack", "Rows", "forward"]


class Forward(NamedTuple):
    """What a forward pass leaves."""

    logits: Tensor  # [L, V] float32
    hidden: Tensor  # [L, H], normed: what the head multiplied
    features: Tensor | None  # [T, len(capture) · H]


def forward(
    tokens: Tensor,
    ends: Ends,
    stack: LayerStack,
    rope: RopeTable,
    rows: Rows | BlockRows,
    capture: tuple[int, ...] = (),
    logit_rows: Tensor | None = None,
    kept: Tensor | None = None,
) -> Forward:
    """Run tokens [T] int64, writing their keys and values: rows of a ragged batch, or slots of draft blocks.

    Args:
        capture: what `features` holds; −1 is the embedding's output, i that of layer i. Not with blocks.
        logit_rows: [L] int64, the rows that have logits; None means all.
        kept: [T] int64, 0 where a row's features may hold anything; None: nowhere.

    Raises:
        ValueError: the tensors do not fit together, or a token, position, page, slot or row does not exist.
    """
    if stack.native and ends.native and tokens.is_cpu:
        return Forward(*run_model(tokens, ends, stack, rope, rows, capture, logit_rows, kept))
    x = embedding(ends.embedding, tokens, ends.norm.dtype, ends.scale)
    features = None
    if isinstance(rows, BlockRows):
        draft_stack(x, stack.layers, stack.caches, rope, rows)
    else:
        features = decoder_stack(x, stack.layers, stack.caches, rope, rows, capture)
    if logit_rows is not None and len(logit_rows) != len(x):
        x = x.index_select(0, logit_rows)
    hidden = rms_norm(x, ends.norm, ends.eps)
    return Forward(matmul(hidden, ends.head).to(torch.float32), hidden, features)
