"""Sequential heads by name: what makes a block's tokens depend on each other (DSpark paper, section 3.2).

A head turns the embedding W1[x_{k−1}] of the token before a slot and the slot's hidden state into a latent
of the Markov rank; the slot's logits are head·h_k + W2·latent. To add a design, write one class here and
register it: `step`, its own parameters, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn


class SequentialHead(nn.Module):
    """W1, W2 and what lies between them; parameter names are those of public checkpoints.

    Args:
        vocab: V, target ids, which index W1.
        rank: r, the width of W1, of W2 and of a latent.
        width: D, the hidden state's width.
        outputs: rows of W2, when the draft vocabulary is smaller than the target's.
    """

    name: ClassVar[str]
    stateful: ClassVar[bool] = False  # whether `step` needs the state of the slot before

    def __init__(self, vocab: int, rank: int, width: int, outputs: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocab if outputs is None else outputs, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.normal_(self.markov_w2.weight, std=0.02)
        self.build(rank, width)

    def build(self, rank: int, width: int) -> None:
        """Make the design's own parameters."""

    def begin(self, w1: Tensor, w2: Tensor) -> None:
        """Start from W1 [V, r] and W2 [N, r] whose product is a bias worth adding as it is."""
        self.markov_w1.weight.copy_(w1)
        self.markov_w2.weight.copy_(w2)

    def step(self, state: Tensor, low: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(latent [..., r], next state [..., r]) from the state (zeros before the first slot), W1[x_{k−1}]
        [..., r] and h_k [..., D]."""
        raise NotImplementedError

    def latents(self, low: Tensor, hidden: Tensor) -> Tensor:
        """Teacher-forced: low [..., γ, r] and hidden [..., γ, D] of a whole block -> latents [..., γ, r]."""
        if not self.stateful:
            return self.step(low, low, hidden)[0]
        state, found = torch.zeros_like(low[..., 0, :]), []
        for k in range(low.shape[-2]):
            latent, state = self.step(state, low[..., k, :], hidden[..., k, :])
            found.append(latent)
        return torch.stack(found, -2)


HEADS: dict[str, type[SequentialHead]] = {}
Head = TypeVar("Head", bound=type[SequentialHead])


def register(name: str) -> Callable[[Head], Head]:
    """Class decorator: `markov_head_type = name` builds this class."""

    def enter(cls: Head) -> Head:
        cls.name = name
        HEADS[name] = cls
        return cls

    return enter


@register("vanilla")
class Vanilla(SequentialHead):
    """Bias W2·W1[x_{k−1}]: a first-order Markov chain over tokens."""

    def step(self, state: Tensor, low: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return low, state


@register("gated")
class Gated(SequentialHead):
    """W2·(σ(gate([h_k; W1[x]])) ⊙ W1[x]): the context says which transitions count."""

    def build(self, rank: int, width: int) -> None:
        self.gate_proj = nn.Linear(width + rank, rank)

    def begin(self, w1: Tensor, w2: Tensor) -> None:
        super().begin(w1, w2)
        nn.init.constant_(self.gate_proj.bias, 2.0)  # gates begin nearly open

    def step(self, state: Tensor, low: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate_proj(torch.cat((hidden, low.to(hidden.dtype)), -1)))
        return gate * low, state


@register("rnn")
class Recurrent(SequentialHead):
    """s ← σ(g)⊙s + (1−σ(g))⊙tanh(c), bias W2·tanh(o), with [g; c; o] linear in [s; W1[x]; h_k]."""

    stateful = True

    def build(self, rank: int, width: int) -> None:
        self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def begin(self, w1: Tensor, w2: Tensor) -> None:
        super().begin(w1, w2)
        # The bias begins as vanilla's, and the state as a fading memory of the block's tokens.
        rank, weight = self.rank, self.joint_proj.weight
        nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.joint_proj.bias)
        for rows in (slice(rank, 2 * rank), slice(2 * rank, 3 * rank)):
            weight[rows, rank : 2 * rank] += torch.eye(rank, device=weight.device)

    def step(self, state: Tensor, low: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat((state.to(hidden.dtype), low.to(hidden.dtype), hidden), -1)
        gate, candidate, output = self.joint_proj(joined).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)
