"""How often drafted tokens survive, for simulations: as a few parameters, or block by block as it was recorded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from engine.schedule.reliability import logit

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often drafted tokens survive.

    Args:
        conditional: by position, P(accepted | all before accepted), averaged over blocks.
        spread: how much blocks differ, as the standard deviation of their logits; confidences see all of it.
        bias: what the drafter's confidences are off by, in logits: 0 is calibrated, above is overconfident.
    """

    conditional: tuple[float, ...]
    spread: float = 1.5
    bias: float = 0.0


class Drawn:
    """Blocks drawn at random by an Acceptance."""

    def __init__(self, profile: Acceptance) -> None:
        self._profile = profile
        # Logits around which blocks spread so that their mean probability is the profile's.
        nodes, weights = np.polynomial.hermite_e.hermegauss(21)
        weights = weights / weights.sum()
        size = len(profile.conditional)
        low, high = np.full(size, -20.0), np.full(size, 20.0)
        for _ in range(50):
            middle = (low + high) / 2
            mean = (weights / (1 + np.exp(-(middle[:, None] + profile.spread * nodes)))).sum(-1)
            low = np.where(mean < profile.conditional, middle, low)
            high = np.where(mean < profile.conditional, high, middle)
        self._center = low

    def block(self, number: int, generator: Generator) -> tuple[Array, Array]:
        """(truth, confidence) [γ] each: conditional chances of acceptance, and what the drafter says of them."""
        profile = self._profile
        truth = 1 / (1 + np.exp(-(self._center + profile.spread * generator.standard_normal(len(self._center)))))
        return truth, 1 / (1 + np.exp(-(logit(truth) + profile.bias)))


@dataclass(frozen=True, slots=True)
class Block:
    """A drafted block of which every token was verified."""

    survival: tuple[float, ...]  # as the scheduler believed before
    accepted: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One request's blocks, in order."""

    blocks: tuple[Block, ...]

    @property
    def conditional(self) -> tuple[float, ...]:
        """One value a position, of the first block."""
        return self._steps(self.blocks[0])

    def block(self, number: int, generator: Generator) -> tuple[Array, Array]:
        """(truth, confidence) [γ] each of the request's block of this number, starting again after the last.

        Truth is 1 for accepted tokens and 0 behind them, in place of a probability.
        """
        block = self.blocks[number % len(self.blocks)]
        return (np.arange(len(block.survival)) < block.accepted).astype(float), np.array(self._steps(block))

    @staticmethod
    def _steps(block: Block) -> tuple[float, ...]:
        """Conditional confidences whose product the survivals are."""
        before = (1.0, *block.survival[:-1])
        return tuple(min(a / max(b, 1e-9), 1.0) for a, b in zip(block.survival, before, strict=True))
