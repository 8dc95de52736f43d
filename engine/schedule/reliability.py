"""Live reliability: what a confidence has been worth lately, by position, verification mode and temperature band.

Corrects the confidences that a drafter hands out, and stands in for them where it hands out none. Learns from finished
rounds alone, so an admission decision built on it stays non-anticipating.
"""

from __future__ import annotations

import numpy as np

from engine.types import Sampling, Verification

Array = np.ndarray

_WARM, _HOT = 0.5, 0.85  # temperature bands: greedy, cool up to .5, warm up to .85, hot
BANDS = 7  # greedy, then three bands under each way to verify
_PRIOR = 30.0  # observations that the handed confidences are worth before any was checked
_PRIOR_BLIND = 4.0  # the same without a confidence head, where they are a mere guess
_MEMORY = 1500.0  # observations after which an old one counts 1/e
_FLUSH = 32  # observations learned from at a time
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
    share of drafted tokens that each request has lately accepted (`Outlook.acceptance`), believed much less.

    Args:
        block_size: γ.
        has_confidence: whether the drafter hands out confidences.
    """

    def __init__(self, block_size: int, has_confidence: bool) -> None:
        self.block_size = block_size
        shape = (BANDS, block_size)
        prior = _PRIOR if has_confidence else _PRIOR_BLIND
        self.shift = np.zeros(shape)
        self.slope = np.ones(shape)
        # The prior's share of the curvature; it never fades, so that the steps stay bounded.
        self._floor = np.zeros((BANDS, block_size, 2, 2))
        self._floor[..., 0, 0] = 0.2 * prior
        self._floor[..., 1, 1] = 0.4 * prior
        self._curvature = np.zeros_like(self._floor)
        self._seen: list[tuple[int, int, float, bool]] = []
        self.verified = np.zeros(shape, np.int64)
        self.accepted = np.zeros(shape, np.int64)

    def correct(self, confidence: Array, bands: Array) -> tuple[Array, Array]:
        """Cumulative survival and the logits it was made from.

        Args:
            confidence: [R, γ] conditional.
            bands: [R].

        Returns:
            survival [R, γ], non-increasing from left to right; logits [R, γ] of the handed confidences.
        """
        handed = logit(confidence.astype(np.float64))
        corrected = 1.0 / (1.0 + np.exp(-(self.shift[bands] + self.slope[bands] * handed)))
        return np.cumprod(corrected, axis=1), handed

    def observe(self, which: int, handed: Array | list[float], verified: int, accepted: int) -> None:
        """One block's fate: positions up to the first rejected one were checked with all before accepted."""
        for position in range(min(accepted + 1, verified)):
            self._seen.append((which, position, float(handed[position]), position < accepted))

    def learn(self) -> None:
        """Take in what was observed, once enough of it is there."""
        if len(self._seen) >= _FLUSH:
            self._step()
            self._seen.clear()

    def _step(self) -> None:
        columns = np.array(self._seen)
        where, position = columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64)
        x, y = columns[:, 2], columns[:, 3]
        p = 1.0 / (1.0 + np.exp(-(self.shift[where, position] + self.slope[where, position] * x)))
        weight = np.maximum(p * (1 - p), 0.01)
        key = where * self.block_size + position
        size = BANDS * self.block_size

        def total(values: Array) -> Array:
            return np.bincount(key, values, size).reshape(BANDS, self.block_size)

        count = total(np.ones_like(y))
        self.verified += count.astype(np.int64)
        self.accepted += total(y).astype(np.int64)
        self._curvature *= np.exp(-count / _MEMORY)[..., None, None]
        self._curvature[..., 0, 0] += total(weight)
        self._curvature[..., 0, 1] += total(weight * x)
        self._curvature[..., 1, 0] = self._curvature[..., 0, 1]
        self._curvature[..., 1, 1] += total(weight * x * x)
        gradient = np.stack([total(y - p), total((y - p) * x)], -1)
        touched = count > 0
        step = np.linalg.solve((self._curvature + self._floor)[touched], gradient[touched][..., None])[..., 0]
        step = np.clip(step, -0.5, 0.5)
        self.shift[touched] = np.clip(self.shift[touched] + step[:, 0], -6, 6)
        self.slope[touched] = np.clip(self.slope[touched] + step[:, 1], 0.05, 3)
