"""Heads that begin by reading the state right before the anchor.

What follows the anchor hangs mostly on the target's last state before it, and a block drafter sees that state through
attention alone: one among all positions of the context. From noise, or from the target's own layers, its heads read the
whole context alike, and are long in finding the place (Gemma 3 270M: after 100 steps moving the context by a position
changed nothing). Here half of the first layer's query heads begin with it:

- keys of the context, not of the block, have a part that is the same everywhere, made by the linear map that comes
  nearest to 1 on the context and to 0 on slots; queries have the same by another map;
- turned by rope, the product of the two is Σ_j cos(θ_j·Δ) at distance Δ: it falls with Δ over the frequencies taken;
- values are the context's principal directions, and the output projection puts them back where they came from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.training.model import Attention

_SLOWEST = 0.02  # radians a position: distances up to a hundred have an order
_SHARE = 0.6  # of a key's square that is the same everywhere
_SHARP = 25.0  # logit at distance 0, where all cosines are 1
_COPY = 2.0  # how much of the state read is added to a slot's stream
_RIDGE = 1e-2  # of the mean square, in the maps to a constant


@torch.no_grad()
def read_nearest(attention: Attention, context: Tensor, slots: Tensor, theta: float) -> None:
    """Set half of the query heads of each group, rounded up, and what all of the group's heads share.

    The other heads keep what they ask for and what they make of it, as far as the group's new values tell it; of their
    queries and keys the frequencies taken are lost.

    Args:
        context, slots: samples of what keys and values are made of, [M, D] and [N, D], as attention gets them.
        theta: rope's base.
    """
    width, groups = attention.head_dim, attention.kv_heads
    share, half = attention.heads // groups, width // 2
    wanted = torch.arange(half, device=context.device) < half * math.log(1.0 / _SLOWEST) / math.log(theta)
    taken = int(wanted.sum())
    both = torch.cat((context, slots))
    known = _towards(both, (torch.arange(len(both), device=both.device) < len(context)).float())
    asked = _towards(slots, torch.ones_like(slots[:, 0]))
    directions = _principal(context)
    kept = torch.cat((~wanted, ~wanted))  # dimension j turns with j + half
    query, key, value = (p.weight.view(-1, width, p.in_features) for p in _projections(attention))
    out = attention.o_proj.weight.view(attention.o_proj.out_features, -1, width)
    for group in range(groups):
        basis = directions[[(group * width + i) % len(directions) for i in range(width)]]
        own = context @ key[group].T
        size = own[:, kept].square().sum(-1).mean() if kept.any() else own.square().sum(-1).mean()
        key[group, wanted.nonzero()[:, 0]] = known * (size * _SHARE / (1.0 - _SHARE) / taken).sqrt()
        key[group, wanted.nonzero()[:, 0] + half] = 0.0
        before = value[group].clone()
        value[group] = basis
        for head in range(group * share, (group + 1) * share):
            if head - group * share < (share + 1) // 2:
                query[head] = 0.0
                query[head, wanted.nonzero()[:, 0]] = asked
                out[:, head] = _COPY * basis.T
            else:
                query[head, ~kept] = 0.0
                out[:, head] = out[:, head] @ before @ basis.T
    # After its norm a query's square is `width`, a key's part that is the same everywhere _SHARE of that.
    attention.q_norm.weight[~kept] = _SHARP / math.sqrt(width * _SHARE)
    attention.k_norm.weight[~kept] = 1.0


def _projections(attention: Attention) -> tuple[torch.nn.Linear, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _towards(samples: Tensor, wanted: Tensor) -> Tensor:
    """The map [D] that is nearest to `wanted` on samples, a little shrunk."""
    square = samples.T @ samples / len(samples)
    square += _RIDGE * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    found: Tensor = torch.linalg.solve(square, samples.T @ wanted / len(samples))
    return found


def _principal(samples: Tensor) -> Tensor:
    """Orthonormal directions [D, D] by falling variance."""
    found: Tensor = torch.linalg.eigh(torch.cov(samples.T))[1].T.flip(0).contiguous()
    return found
