"""Live reliability: what a confidence has been worth lately, by position, verification mode and temperature band.

Corrects the confidences that a drafter hands out, and stands in for them where it hands out none. Learns from finished
rounds alone, so an admission decision built on it stays non-anticipating.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_reliability
from engine.schedule.native_books import BANDS
from engine.types import Sampling, Verification

Array = np.ndarray

_WARM, _HOT = 0.5, 0.85  # temperature bands: greedy, cool up to .5, warm up to .85, hot
_PRIOR = 30.0  # observations that the handed confidences are worth before any was checked
_PRIOR_BLIND = 4.0  # the same without a confidence head, where they are a mere guess
_EDGE = 1e-4  # confidences are kept this far from 0 and 1


def band(sampling: Sampling, verification: Verification) -> int:
    """Which reliability a request shares: greedy ones all share one, whatever verifies them."""
    if sampling.temperature == 0:
        return 0
    warmth = (sampling.temperature > _WARM) + (sampling.temperature > _HOT)
    return 1 + 3 * (verification is Verification.COUPLED) + warmth


def logit(p: Array) -> Array:
    """ln p/(1−p), p kept off the edges."""
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.log(p / (1 - p))


class Reliability:
    """P(accepted | confidence, all before accepted) = σ(a + b · logit c), one (a, b) a position and band.

    Each pair follows its own stream by Newton steps on the logistic loss with a fading memory, from a = 0, b = 1: the
    handed confidence is believed until rounds contradict it. For a drafter without a head the scheduler hands in the
    share of drafted tokens that each request has lately accepted (`native_books.KEPT`), believed much less.

    Args:
        block_size: γ.
        has_confidence: whether the drafter hands out confidences.
    """

    def __init__(self, block_size: int, has_confidence: bool) -> None:
        shape = (BANDS, block_size)
        prior = _PRIOR if has_confidence else _PRIOR_BLIND
        self.lines = np.zeros((*shape, 2))  # shift, slope
        self.lines[..., 1] = 1.0
        # The prior's share of the curvature; it never fades, so that the steps stay bounded.
        self._floor = np.zeros((*shape, 3))
        self._floor[..., 0] = 0.2 * prior
        self._floor[..., 2] = 0.4 * prior
        self._curvature = np.zeros_like(self._floor)
        self._sums = np.zeros((*shape, native_reliability.SUMS))
        self.verified = np.zeros(shape, np.int64)
        self.accepted = np.zeros(shape, np.int64)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """In `native_desk`'s order, from LINES on; changed in place alone."""
        return self.lines, self._curvature, self._floor, self._sums, self.verified, self.accepted

    def correct(self, confidence: Array, bands: Array) -> tuple[Array, Array]:
        """Cumulative survival and the logits it was made from; what `native_survival.survivals` does.

        Args:
            confidence: [R, γ] conditional.
            bands: [R].

        Returns:
            survival [R, γ], non-increasing from left to right; logits [R, γ] of the handed confidences.
        """
        handed = logit(confidence.astype(np.float64))
        shift, slope = self.lines[bands, :, 0], self.lines[bands, :, 1]
        return np.cumprod(1.0 / (1.0 + np.exp(-(shift + slope * handed))), axis=1), handed

    def teach(self, bands: Array, handed: Array, verified: Array, accepted: Array) -> None:
        """Blocks' fates, learned from once enough of them are there.

        Args:
            bands, verified, accepted: [R] int64.
            handed: [R, L] logits of the confidences as they were handed out.
        """
        native_reliability.teach(
            bands,
            handed,
            verified,
            accepted,
            self.lines,
            self._curvature,
            self._floor,
            self._sums,
            self.verified,
            self.accepted,
        )
