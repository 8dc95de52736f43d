"""The loss of a drafter that is taught distributions (DSpark paper, equations 8 to 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.draft_vocabulary import NO_GOAL, DraftVocabulary
from engine.training.labels import Label, spread_mass
from engine.training.settings import knob


@dataclass(frozen=True)
class Terms:
    """Mixing weights of the three terms and the decay over slots."""

    cross_entropy: float = knob(0.1, "weight of the cross-entropy with the true token")
    distance: float = knob(0.9, "weight of the total-variation term ‖p_d − p_t‖₁")
    confidence: float = knob(1.0, "weight of the confidence head's binary cross-entropy")
    decay: float = knob(4.0, "slots over which a slot's weight falls by e; the paper says γ, its code 4")


def slot_weights(valid: Tensor, decay: float) -> Tensor:
    """w = exp(−(k−1)/decay) where valid, k the 1-based slot: bool [..., γ] -> fp32 [..., γ] (equation 12)."""
    slot = torch.arange(valid.shape[-1], dtype=torch.float32, device=valid.device)
    return torch.exp(-slot / decay) * valid.float()


def token_terms(
    draft: Tensor,
    target: Tensor,
    goals: Tensor,
    ids: Tensor | None = None,
    log_z: Tensor | None = None,
    best: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy, ‖p_d − p_t‖₁, argmax agreement), each [rows].

    Over a reduced draft vocabulary p_d is 0 for the other tokens: the distance counts the target's whole mass there,
    so that 1 − ½·distance stays the exact acceptance rate; a true token out there has no cross-entropy.

    Args:
        draft: logits [rows, V], or [rows, N] over `ids`; target, log_z, best: see `labels.Label`.
        goals: the true tokens' draft ids [rows], `NO_GOAL` for those that have none.
        ids: target ids [N] of a reduced draft vocabulary.
    """
    log_draft = torch.log_softmax(draft.float(), -1)
    with torch.no_grad():
        p_target, best = spread_mass(target, ids, log_z, best)
    entropy = F.nll_loss(log_draft, goals, reduction="none", ignore_index=NO_GOAL)
    distance = (log_draft.exp() - p_target).abs().sum(-1)
    if ids is None:
        agree = (draft.argmax(-1) == best).float()
    else:
        distance = distance + (1.0 - p_target.sum(-1)).clamp_min(0.0)
        agree = (ids[draft.argmax(-1)] == best).float()
    return entropy, distance, agree


class TokenLoss:
    """Σ_rows w·(α·CE + β·‖p_d − p_t‖₁) of a chunk's logits; compiled on request."""

    def __init__(self, terms: Terms, vocabulary: DraftVocabulary) -> None:
        self.terms, self.vocabulary = terms, vocabulary
        self.token_terms: Callable[..., tuple[Tensor, Tensor, Tensor]] = token_terms

    def quicken(self) -> None:
        """Fuse the passes over the vocabulary."""
        self.token_terms = torch.compile(token_terms, dynamic=False)

    def __call__(
        self, draft: Tensor, target: Label, goals: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """draft [rows, V or N]; goals (target ids) and weight [rows] -> (sum, (acceptance 1 − TV, agreement,
        cross-entropy by row))."""
        goals, ids = self.vocabulary.goals(goals), self.vocabulary.on(goals.device)
        entropy, distance, agree = self.token_terms(draft, target.logits, goals, ids, target.log_z, target.best)
        each = self.terms.cross_entropy * entropy + self.terms.distance * distance
        accept = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
        return (weight * each).sum(), (accept, agree, entropy.detach())


def confidence_loss(logits: Tensor, accept: Tensor, weight: Tensor) -> Tensor:
    """Σ w·BCE(σ(logits), c*) with the soft label c* = 1 − ½‖p_d − p_t‖₁ (equation 10); all [N]."""
    return (weight * F.binary_cross_entropy_with_logits(logits.float(), accept, reduction="none")).sum()


def expected_length(accept: Tensor) -> Tensor:
    """Expected tokens a round with every slot verified: 1 + Σ_k Π_{i≤k} a_i, [N, γ] -> [N]."""
    return 1.0 + accept.cumprod(-1).sum(-1)
