"""Policies by name. Each chooses the verified prefix of every block of a round; `auto` also chooses who drafts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from engine.config import EngineConfig
from engine.schedule import native_lengths
from engine.schedule.cost import LiveCost, Work
from engine.schedule.lengths import (
    Candidate,
    Choice,
    Frame,
    best_budget,
    causal,
    fixed_length,
    gains_in_order,
    priced,
    threshold_length,
    top,
)
from engine.schedule.record import Stop
from engine.types import SpeculationMode

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Round:
    """What a policy may know of a round besides its blocks. All of it is older than the blocks' tokens."""

    work: Work  # with ℓ = 0 for everybody
    cost: LiveCost
    tokens: float  # Σ of the decoding requests' weights
    price: float = 0.0  # weighted tokens that a second is worth
    decay: float = 0.6

    def frame(self, candidates: Row[Candidate], fixed: Row[int]) -> Frame:
        """The round once `fixed` of each candidate's tokens are verified whatever the policy says."""
        rows, own_s, tokens = self.work.rows, 0.0, self.tokens
        for candidate, length in zip(candidates, fixed, strict=True):
            rows += length
            own_s += length * candidate.row_s
            tokens += candidate.weight * sum(candidate.survival[:length])
        base_s = self.cost.times(replace(self.work, rows=rows)).total + own_s
        first = round(rows + self.cost.table.prefill_row * self.work.prefill)
        curve = self.cost.curve
        first = min(first, len(curve) - 1)
        most = sum(c.limit for c in candidates)
        zero = curve[first]
        return Frame(tokens, base_s, [s - zero for s in curve[first : first + most + 1]], self.price, self.decay)


class LengthPolicy(Protocol):
    """Chooses the verified prefix of every block of a round."""

    name: str

    @property
    def rule(self) -> int | None:
        """Of `native_lengths`, which then decides in its place; None where only `choose` knows."""
        ...

    def choose(self, candidates: Row[Candidate], round_: Round) -> Choice:
        """One length a candidate, between 0 and its limit."""
        ...


class StaticLengths:
    """Fixed or threshold, by the request's own wish or else by the engine's policy.

    Args:
        mode: FIXED or THRESHOLD, for requests that leave the choice (AUTO).
    """

    rule: int | None = native_lengths.STATIC

    def __init__(self, mode: SpeculationMode, draft_tokens: int | None, threshold: float) -> None:
        assert mode in (SpeculationMode.FIXED, SpeculationMode.THRESHOLD)
        self.name = mode.value
        self.mode = mode
        self.draft_tokens = draft_tokens
        self.threshold = threshold

    @property
    def fixed_tokens(self) -> int | None:
        """What it verifies of every block at most; None: all of it."""
        return self.draft_tokens if self.mode is SpeculationMode.FIXED else None

    def choose(self, candidates: Row[Candidate], round_: Round | None = None) -> Choice:
        return Choice([self.length(candidate) for candidate in candidates], Stop.RULE)

    def length(self, candidate: Candidate) -> int:
        wish = candidate.speculation
        mode = self.mode if wish.mode is SpeculationMode.AUTO else wish.mode
        if mode is SpeculationMode.FIXED:
            tokens = self.draft_tokens if wish.draft_tokens is None else wish.draft_tokens
            return fixed_length(candidate.limit, tokens)
        threshold = self.threshold if wish.confidence_threshold is None else wish.confidence_threshold
        return threshold_length(candidate.confidence, candidate.limit, threshold)


class AdaptiveLengths:
    """Requests that leave the choice share what `_share` grants; the others get what they asked for."""

    name = ""
    rule: int | None = None

    def __init__(self, config: EngineConfig) -> None:
        self.asked = StaticLengths(SpeculationMode.FIXED, config.draft_tokens, config.confidence_threshold)

    def choose(self, candidates: Row[Candidate], round_: Round) -> Choice:
        asked = [0 if c.speculation.mode is SpeculationMode.AUTO else self.asked.length(c) for c in candidates]
        ours = [c for c in candidates if c.speculation.mode is SpeculationMode.AUTO]
        if not ours:
            return Choice(asked, Stop.RULE if candidates else Stop.NOBODY)
        choice = self._share(ours, round_.frame(candidates, asked))
        granted = iter(choice.lengths)
        lengths = [
            next(granted) if c.speculation.mode is SpeculationMode.AUTO else length
            for c, length in zip(candidates, asked, strict=True)
        ]
        return Choice(lengths, choice.stop)

    def _share(self, candidates: Row[Candidate], frame: Frame) -> Choice:
        raise NotImplementedError


class CausalLengths(AdaptiveLengths):
    """Algorithm 1 with its early stop."""

    name = "causal"
    rule = native_lengths.CAUSAL

    def _share(self, candidates: Row[Candidate], frame: Frame) -> Choice:
        return causal(candidates, frame)


class RelayedLengths(AdaptiveLengths):
    """A budget from the confidences of two rounds ago, spent on the best of the current ones.

    For hosts that must not wait for the device: the budget is known before the block is. The first two rounds, which
    have nothing to relay, verify nothing.
    """

    name = "relayed"
    rule = native_lengths.RELAYED

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.past: deque[tuple[Array, int]] = deque(maxlen=2)  # falling gains, and the blocks they came from

    def _share(self, candidates: Row[Candidate], frame: Frame) -> Choice:
        budget = 0
        if len(self.past) == 2:
            gains, blocks = self.past[0]
            # Another number of blocks stretches the order of gains, not their level.
            stretch = len(candidates) / blocks
            count = round(len(gains) * stretch)
            stretched = [gains[min(int(k / stretch), len(gains) - 1)] for k in range(count)]
            budget = best_budget(stretched, frame)
        self.past.append((np.array(gains_in_order(candidates)), len(candidates)))
        return top(candidates, budget)


class AutoLengths(AdaptiveLengths):
    """Every admitted token pays for itself at the going rate; rejection rows causally, free rows with hindsight."""

    name = "auto"
    rule = native_lengths.PRICED

    def _share(self, candidates: Row[Candidate], frame: Frame) -> Choice:
        return priced(candidates, frame)


def make_policy(config: EngineConfig) -> LengthPolicy | None:
    """The policy that the configuration names; None is plain decoding."""
    match config.policy:
        case "plain":
            return None
        case "fixed" | "threshold":
            return StaticLengths(SpeculationMode(config.policy), config.draft_tokens, config.confidence_threshold)
        case "causal":
            return CausalLengths(config)
        case "relayed":
            return RelayedLengths(config)
        case _:
            return AutoLengths(config)
