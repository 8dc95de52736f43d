"""What each row that a drafter predicts is taught, over the target's vocabulary or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.draft_vocabulary import NO_GOAL, DraftVocabulary
from engine.training.labels import Label, spread_mass
from engine.training.settings import SettingsError, knob


@dataclass(frozen=True)
class StepTerms:
    """Mixing weights and the decay over steps; the published Eagle3 is soft cross-entropy alone."""

    soft: float = knob(1.0, "weight of the cross-entropy with the target's distribution, −Σ p_t log p_d")
    cross_entropy: float = knob(0.0, "weight of the cross-entropy with the true token")
    distance: float = knob(0.0, "weight of the total-variation term ‖p_d − p_t‖₁")
    decay: float = knob(0.8, "a step's weight over that of the step before it")

    def __post_init__(self) -> None:
        if min(self.soft, self.cross_entropy, self.distance) < 0 or self.decay <= 0:
            raise SettingsError("weights must not be negative, and decay must be positive")


def step_terms(
    draft: Tensor,
    target: Tensor,
    goals: Tensor,
    ids: Tensor | None,
    log_z: Tensor | None = None,
    best: Tensor | None = None,
    soft: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(soft cross-entropy, cross-entropy, ‖p_d − p_t‖₁, argmax agreement), each [N].

    Over a part of the vocabulary the soft label is p_t renormalised to it, as in EAGLE-3; the distance is that of the
    whole distributions, p_d being 0 elsewhere, so that 1 − ½·distance stays the exact acceptance rate.

    Args:
        draft: logits [N, draft vocabulary]; target, log_z, best: see `labels.Label`.
        goals: the true tokens' draft ids [N], `NO_GOAL` for those that have none: their cross-entropy is 0.
        ids: the draft vocabulary's target ids; None for all.
        soft: whether the first is wanted; else it is 0.
    """
    log_draft = torch.log_softmax(draft.float(), -1)
    with torch.no_grad():
        p_target, best = spread_mass(target, ids, log_z, best)
        label = p_target / p_target.sum(-1, keepdim=True).clamp_min(1e-20)
    softly = -(label * log_draft).sum(-1) if soft else torch.zeros_like(log_draft[:, 0])
    entropy = F.nll_loss(log_draft, goals, reduction="none", ignore_index=NO_GOAL)
    distance = 2.0 - 2.0 * torch.minimum(log_draft.exp(), p_target).sum(-1)
    chosen = draft.argmax(-1)
    agree = ((chosen if ids is None else ids[chosen]) == best).float()
    return softly, entropy, distance, agree


class Mix(Protocol):
    """Mixing weights of a loss: those of unrolled drafters (`StepTerms`), or of block drafters (`losses.Terms`)."""

    @property
    def soft(self) -> float: ...
    @property
    def cross_entropy(self) -> float: ...
    @property
    def distance(self) -> float: ...


class StepLoss:
    """Σ_rows w·ℓ of a chunk's logits; compiled on request."""

    def __init__(self, terms: Mix, vocabulary: DraftVocabulary) -> None:
        self.terms, self.vocabulary = terms, vocabulary
        self.step_terms: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = step_terms

    def quicken(self) -> None:
        """Fuse the passes over the vocabulary."""
        self.step_terms = torch.compile(step_terms, dynamic=False)

    def __call__(
        self, draft: Tensor, target: Label, goals: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """draft [N, draft vocabulary], goals [N], weight [N] -> (sum, (acceptance [N], agreement [N],
        cross-entropy [N]))."""
        terms, goals, ids = self.terms, self.vocabulary.goals(goals), self.vocabulary.on(goals.device)
        told = (target.logits, goals, ids, target.log_z, target.best)
        soft, entropy, distance, agree = self.step_terms(draft, *told, soft=terms.soft > 0)
        each = terms.soft * soft + terms.cross_entropy * entropy + terms.distance * distance
        accept = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
        return (weight * each).sum(), (accept, agree, entropy.detach())
