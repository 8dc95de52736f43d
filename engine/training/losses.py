"""The loss of a drafter that is taught distributions (DSpark paper, equations 8 to 12)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.settings import knob


@dataclass(frozen=True)
class Terms:
    """Mixing weights of the three terms and the decay over slots."""

    cross_entropy: float = knob(0.1, "weight of the cross-entropy with the true token")
    soft: float = knob(
        0.0, "weight of the cross-entropy with the target's distribution, −Σ p_t log p_d; not the paper's"
    )
    distance: float = knob(0.9, "weight of the total-variation term ‖p_d − p_t‖₁")
    confidence: float = knob(1.0, "weight of the confidence head's binary cross-entropy")
    decay: float = knob(4.0, "slots over which a slot's weight falls by e; the paper says γ, its code 4")


def slot_weights(valid: Tensor, decay: float) -> Tensor:
    """w = exp(−(k−1)/decay) where valid, k the 1-based slot: bool [..., γ] -> fp32 [..., γ] (equation 12)."""
    slot = torch.arange(valid.shape[-1], dtype=torch.float32, device=valid.device)
    return torch.exp(-slot / decay) * valid.float()


def confidence_loss(logits: Tensor, accept: Tensor, weight: Tensor) -> Tensor:
    """Σ w·BCE(σ(logits), c*) with the soft label c* = 1 − ½‖p_d − p_t‖₁ (equation 10); all [N]."""
    return (weight * F.binary_cross_entropy_with_logits(logits.float(), accept, reduction="none")).sum()


def expected_length(accept: Tensor) -> Tensor:
    """Expected tokens a round with every slot verified: 1 + Σ_k Π_{i≤k} a_i, [N, γ] -> [N]."""
    return 1.0 + accept.cumprod(-1).sum(-1)
