"""The weights of the sequential and confidence heads, and the small functions that precede W2.

Equations and input orders are those of the DSpark paper and of DeepSpec's `markov_head.py`: the gate reads [h; W1[x]],
the recurrent head [s; W1[x]; h] and splits into gate, candidate and output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch

from kernels.jit import native
from kernels.panel import PANEL, dot, pack
from kernels.vector import exp_float32

KINDS = ("none", "vanilla", "gated", "rnn")  # those with a kernel
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
MEMO_ROWS, MEMO_BYTES = 4096, 64 << 20
_ONE, _TWO, _LIMIT = np.float32(1.0), np.float32(2.0), np.float32(80.0)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """A draft head's tensors, r the Markov rank, H the hidden size. They must not change once the head was used.

    Give w2 in bfloat16 (or with values that bfloat16 holds exactly) for the fast CPU path: the product is bound
    by reading it. Such rounding changes what is drafted, never the distribution of the output.
    """

    kind: Literal["none", "vanilla", "gated", "rnn", "custom"] = "none"
    w1: torch.Tensor | None = None  # [V, r], indexed by the previous token
    w2: torch.Tensor | None = None  # [V, r]; [N, r] with a reduced draft vocabulary
    ids: torch.Tensor | None = None  # [N] int64: the target ids of a reduced draft vocabulary, in draft order
    vocabulary: int = 0  # V; needed with ids
    gate_weight: torch.Tensor | None = None  # gated: [r, H + r] over [h; W1[x]]
    gate_bias: torch.Tensor | None = None  # [r]
    joint_weight: torch.Tensor | None = None  # rnn: [3r, 2r + H] over [s; W1[x]; h]; gate, candidate, output
    joint_bias: torch.Tensor | None = None  # [3r]
    step: Step | None = None  # custom: (state [R, r], W1[x] [R, r], h [R, H]) -> (latent, next state); plain torch
    confidence_weight: torch.Tensor | None = None  # [H + r], or [H]
    confidence_bias: float = 0.0
    confidence_with_markov: bool = True  # whether the confidence reads W1[x_{k−1}]

    def __post_init__(self) -> None:
        if self.kind != "none" and (self.w1 is None or self.w2 is None):
            raise ValueError(f"a {self.kind} head needs w1 and w2")
        if self.ids is not None and (not self.vocabulary or (self.w2 is not None and len(self.w2) != len(self.ids))):
            raise ValueError("a reduced draft vocabulary needs the size of the whole one, and a row of w2 for each id")
        if self.kind == "gated" and self.gate_weight is None:
            raise ValueError("a gated head needs gate_weight")
        if self.kind == "rnn" and self.joint_weight is None:
            raise ValueError("an rnn head needs joint_weight")
        if self.kind == "custom" and self.step is None:
            raise ValueError("a custom head needs step")
        if self.kind == "none" and self.confidence_weight is not None and self.confidence_with_markov:
            raise ValueError("the confidence head reads Markov features, but there is no Markov head")

    @property
    def rank(self) -> int:
        return 0 if self.w1 is None else int(self.w1.shape[1])

    @cached_property
    def widened(self) -> HeadWeights:
        """The same head over the target's vocabulary, for kernels that know no other: w2 is 0 where no id is."""
        if self.ids is None:
            return self
        w2 = self.w2
        if w2 is not None:
            w2 = w2.new_zeros(self.vocabulary, w2.shape[1]).index_copy_(0, self.ids, w2)
        return replace(self, w2=w2, ids=None)

    def widen(self, base_logits: torch.Tensor) -> torch.Tensor:
        """Base logits [R, γ, N] over the draft vocabulary as [R, γ, V], −inf where no id is."""
        if self.ids is None:
            return base_logits
        wide = base_logits.new_full((*base_logits.shape[:2], self.vocabulary), -torch.inf)
        return wide.index_copy_(2, self.ids, base_logits)

    @cached_property
    def packed(self) -> PackedHead:
        """The CPU kernel's own copy, made once."""
        return PackedHead.of(self)

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Addresses and sizes of the copy, in the order of `kernels.markov_native`."""
        p = self.packed
        address = [array.ctypes.data for array in (p.w1, p.panels, p.mix_weight, p.mix_bias, p.confidence_weight)]
        w1, panels, mix, mix_bias, weight = address
        return (
            *(p.kind, w1, *p.w1.shape, panels, p.panels.shape[0], int(p.narrow), mix, *p.mix_weight.shape, mix_bias),
            *(weight, p.confidence_weight.shape[0], p.confidence_bias.ctypes.data),
            *(p.memo.ctypes.data, p.memo.shape[0], p.memo_state.ctypes.data, p.ids.ctypes.data, p.ids.shape[0]),
        )


class PackedHead(NamedTuple):
    """Arrays of the CPU kernel. A vanilla head's bias is a function of one token: recent ones are kept, so `memo` and
    `memo_state` change as the kernel runs; its threads agree about that, and two calls at a time would, too."""

    kind: int  # index into KINDS
    w1: np.ndarray  # [V, r] float32
    panels: np.ndarray  # W2, see kernels.panel
    narrow: bool  # whether these are bfloat16
    mix_weight: np.ndarray  # [r, H + r] gated, [3r, 2r + H] rnn
    mix_bias: np.ndarray  # [r] or [3r]
    confidence_weight: np.ndarray  # [H + r], [H], or empty
    confidence_bias: np.ndarray  # [1]
    memo: np.ndarray  # [slots, padded V] float32: W2·W1[x], x in slot x mod slots
    memo_state: np.ndarray  # [slots, 2] int64: x, or −1; and how often the slot was begun and finished, odd in between
    ids: np.ndarray  # [N] int64, or empty

    @classmethod
    def of(cls, head: HeadWeights) -> PackedHead:
        def array(tensor: torch.Tensor | None, *shape: int) -> np.ndarray:
            values = torch.zeros(shape) if tensor is None else tensor.detach().float()
            return np.ascontiguousarray(values.numpy())

        mix_weight = head.gate_weight if head.kind == "gated" else head.joint_weight
        mix_bias = head.gate_bias if head.kind == "gated" else head.joint_bias
        panels = pack(torch.zeros((0, 0)) if head.w2 is None else head.w2.detach())
        padded = panels.shape[0] * PANEL
        slots = min(MEMO_ROWS, MEMO_BYTES // (4 * padded)) if head.kind == "vanilla" else 0
        return cls(
            KINDS.index(head.kind),
            array(head.w1, 0, 0),
            panels,
            panels.dtype == np.uint32,
            array(mix_weight, 0, 0),
            array(mix_bias, 0 if mix_weight is None else mix_weight.shape[0]),
            array(head.confidence_weight, 0).reshape(-1),
            np.array([head.confidence_bias], np.float32),
            np.empty((slots, padded), np.float32),
            np.tile(np.array([-1, 0], np.int64), (slots, 1)),
            np.empty(0, np.int64) if head.ids is None else head.ids.numpy(),
        )


@native
def sigmoid(x: np.float32) -> np.float32:
    clamped = min(max(-x, -_LIMIT), _LIMIT)
    return _ONE / (_ONE + exp_float32(clamped))


@native
def _tanh(x: np.float32) -> np.float32:
    return _TWO * sigmoid(_TWO * x) - _ONE


@native
def gated_latent(
    h: np.ndarray,
    previous: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    inputs: np.ndarray,
    latent: np.ndarray,
) -> None:
    """latent = σ(gate([h; W1[x]])) ⊙ W1[x]."""
    inputs[: h.shape[0]] = h
    inputs[h.shape[0] :] = previous
    for j in range(latent.shape[0]):
        latent[j] = sigmoid(dot(weight[j], inputs) + bias[j]) * previous[j]


@native
def recurrent_latent(
    h: np.ndarray,
    previous: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    inputs: np.ndarray,
    state: np.ndarray,
    latent: np.ndarray,
) -> None:
    """s ← σ(g) ⊙ s + (1 − σ(g)) ⊙ tanh(c), latent = tanh(o), with [g; c; o] = joint([s; W1[x]; h])."""
    rank = latent.shape[0]
    inputs[:rank] = state
    inputs[rank : 2 * rank] = previous
    inputs[2 * rank :] = h
    for j in range(rank):
        gate = sigmoid(dot(weight[j], inputs) + bias[j])
        candidate = _tanh(dot(weight[rank + j], inputs) + bias[rank + j])
        latent[j] = _tanh(dot(weight[2 * rank + j], inputs) + bias[2 * rank + j])
        state[j] = gate * state[j] + (_ONE - gate) * candidate
