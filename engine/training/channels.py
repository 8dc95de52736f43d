"""The sizes of a target's channels over the data, so that a drafter begins with all of them in sight.

A residual stream may carry a few channels a hundred times as large as the rest (behind layer 16 of Gemma 3 270M 29,417
against a median of 358). Read as they are, a drafter's first norm sees little but the large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.training.frozen import Frozen
from engine.training.gemma3 import Target
from engine.training.sources import UNIT, Mixture, Stream

_ROWS = 16  # of 256 tokens: sizes within a few per cent
_LEAST = 1e-3  # of the median: a channel that is as good as silent stays so
SCALE = "feature_scale"


class Sizes(NamedTuple):
    """Root mean squares over the data, fp32."""

    features: Tensor  # [n·D]
    hidden: Tensor  # [D] of the final normed states


@torch.no_grad()
def sizes(target: Target, layers: tuple[int, ...], streams: Sequence[Stream], shares: Sequence[float]) -> Sizes:
    """Measured on a few rows of the training data, each from its first token on.

    Args:
        layers: whose outputs the drafter reads; −1 is the embedding's.
    """
    features, hidden, _ = sample(target, layers, streams, shares)
    return Sizes(_size(features), _size(hidden))


@torch.no_grad()
def sample(
    target: Target, layers: tuple[int, ...], streams: Sequence[Stream], shares: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, T, n·D], final normed states [B, T, D] and tokens [B, T] of a few rows of the training data.

    Without each row's first position, whose states are like no other's.
    """
    mixture = Mixture(streams, shares, seed=0, end_id=0)
    tokens, _ = mixture.tokens(mixture.draws(0, _ROWS, UNIT), UNIT)
    tokens, head = tokens.to(target.head.device), target.head
    with torch.autocast(head.device.type, torch.bfloat16, enabled=head.dtype is torch.bfloat16):
        features, hidden = Frozen(target, layers).run(tokens)
    return features[:, 1:].float(), hidden[:, 1:].float(), tokens[:, 1:]


def _size(states: Tensor) -> Tensor:
    size = states.float().square().mean((0, 1)).sqrt()
    return size.clamp_min(_LEAST * float(size.median()) + 1e-12)


def inverse(size: Tensor) -> Tensor:
    """1 / size by channel, rounded to powers of two: whatever it is folded into, no bit of that is lost."""
    return torch.exp2(-torch.log2(size).round())


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A drafter's tensors as they are served: fc reads the target's features as they come."""
    served = dict(tensors)
    scale = served.pop(SCALE, None)
    if scale is not None:
        served["fc.weight"] = served["fc.weight"] * scale
    return served
