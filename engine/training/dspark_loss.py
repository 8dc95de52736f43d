"""DSpark's training loss and the acceptance it implies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Weights:
    """Mixing weights of the three terms and the decay over slots."""

    cross_entropy: float = 0.1
    distance: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0


def dspark_loss(
    draft: Tensor, confidence: Tensor, target: Tensor, goals: Tensor, valid: Tensor, w: Weights
) -> tuple[Tensor, Tensor]:
    """0.1·CE + 0.9·‖p_d − p_t‖₁ + BCE(confidence, 1 − ½‖p_d − p_t‖₁), weighted over slots.

    draft, target: logits [N, γ, V]; confidence: logits [N, γ]; goals: true tokens [N, γ];
    valid: bool [N, γ], a contiguous prefix of each block. Each term is Σwℓ/Σw with
    w = exp(−(k−1)/decay), k the 1-based slot. Returns (loss, acceptance 1 − TV [N, γ]).
    """
    slot = torch.arange(draft.shape[1], dtype=torch.float32)
    weight = torch.exp(-slot / w.decay) * valid.float()
    weight = weight / weight.sum().clamp_min(1e-9)
    log_draft = torch.log_softmax(draft.float(), -1)
    with torch.no_grad():
        p_target = torch.softmax(target.float(), -1)
    entropy = F.nll_loss(log_draft.flatten(0, 1), goals.flatten(), reduction="none")
    distance = (log_draft.exp() - p_target).abs().sum(-1)
    accept = (1.0 - 0.5 * distance).detach().clamp(0.0, 1.0)
    match = F.binary_cross_entropy_with_logits(confidence.float(), accept, reduction="none")
    each = w.cross_entropy * entropy.view_as(distance) + w.distance * distance
    return (weight * (each + w.confidence * match)).sum(), accept


def expected_length(accept: Tensor) -> Tensor:
    """Expected tokens a round with every slot verified: 1 + Σ_k Π_{i≤k} a_i, [N, γ] -> [N]."""
    return 1.0 + accept.cumprod(-1).sum(-1)
