"""The loss of a drafter that is taught distributions (DSpark paper, equations 8 to 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.draft_vocabulary import DraftVocabulary
from engine.training.labels import Label
from engine.training.settings import knob
from engine.training.step_loss import step_terms


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


class TokenLoss:
    """Σ_rows w·(α·CE + β·‖p_d − p_t‖₁ + ς·soft CE) of a chunk's logits; compiled on request."""

    def __init__(self, terms: Terms, vocabulary: DraftVocabulary) -> None:
        self.terms, self.vocabulary = terms, vocabulary
        self.step_terms: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = step_terms

    def quicken(self) -> None:
        """Fuse the passes over the vocabulary."""
        self.step_terms = torch.compile(step_terms, dynamic=False)

    def __call__(
        self, draft: Tensor, target: Label, goals: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """draft [rows, V or N]; goals (target ids) and weight [rows] -> (sum, (acceptance 1 − TV, agreement,
        cross-entropy by row))."""
        goals, ids = self.vocabulary.goals(goals), self.vocabulary.on(goals.device)
        terms, told = self.terms, (target.logits, goals, ids, target.log_z, target.best)
        soft, entropy, distance, agree = self.step_terms(draft, *told, soft=terms.soft > 0)
        each = terms.cross_entropy * entropy + terms.distance * distance + terms.soft * soft
        accept = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
        return (weight * each).sum(), (accept, agree, entropy.detach())


def confidence_loss(logits: Tensor, accept: Tensor, weight: Tensor) -> Tensor:
    """Σ w·BCE(σ(logits), c*) with the soft label c* = 1 − ½‖p_d − p_t‖₁ (equation 10); all [N]."""
    return (weight * F.binary_cross_entropy_with_logits(logits.float(), accept, reduction="none")).sum()


def expected_length(accept: Tensor) -> Tensor:
    """Expected tokens a round with every slot verified: 1 + Σ_k Π_{i≤k} a_i, [N, γ] -> [N]."""
    return 1.0 + accept.cumprod(-1).sum(-1)
