"""How much of each drafted block to verify: pure functions of confidences and past rounds.

Every policy here is non-anticipating: whether position k is verified depends on the confidences of
positions up to k, and those never look at token x_k itself. Rejection sampling stays lossless only so
(DSpark paper, Appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Protocol

from engine.types import Speculation, SpeculationMode


@dataclass(frozen=True, slots=True)
class Candidate:
    """One drafted block: conditional confidences left to right, and what the request says about it."""

    confidence: Row[float] | None  # None: the drafter has no confidence head
    limit: int  # tokens that may be verified: block, pages, max_tokens and context allow no more
    speculation: Speculation


class LengthPolicy(Protocol):
    """Chooses the verified prefix of every block of a round."""

    name: str

    def lengths(self, candidates: Row[Candidate]) -> list[int]:
        """One length a candidate, between 0 and its limit."""
        ...


def fixed_length(limit: int, draft_tokens: int | None) -> int:
    """The first `draft_tokens`, or the whole block."""
    return limit if draft_tokens is None else min(limit, draft_tokens)


def threshold_length(confidence: Row[float] | None, limit: int, threshold: float) -> int:
    """The longest prefix whose every conditional confidence reaches `threshold`; all without a head."""
    if confidence is None:
        return limit
    for k in range(limit):
        if confidence[k] < threshold:
            return k
    return limit


class StaticLengths:
    """Fixed or threshold, by the request's own wish or else by the engine's policy.

    Args:
        mode: FIXED or THRESHOLD, for requests that leave the choice (AUTO).
    """

    def __init__(self, mode: SpeculationMode, draft_tokens: int | None, threshold: float) -> None:
        assert mode in (SpeculationMode.FIXED, SpeculationMode.THRESHOLD)
        self.name = mode.value
        self._mode = mode
        self._draft_tokens = draft_tokens
        self._threshold = threshold

    def lengths(self, candidates: Row[Candidate]) -> list[int]:
        return [self._length(candidate) for candidate in candidates]

    def _length(self, candidate: Candidate) -> int:
        wish = candidate.speculation
        mode = self._mode if wish.mode is SpeculationMode.AUTO else wish.mode
        if mode is SpeculationMode.FIXED:
            tokens = self._draft_tokens if wish.draft_tokens is None else wish.draft_tokens
            return fixed_length(candidate.limit, tokens)
        threshold = self._threshold if wish.confidence_threshold is None else wish.confidence_threshold
        return threshold_length(candidate.confidence, candidate.limit, threshold)
