"""Padded sizes as a staircase, what each takes, and which one a round gets.

A size is chosen before its round's drafts exist: by the survivals of the last round that was read, two rounds back. So
whether a position is verified does not depend on its token, nor on anything drawn after it (DSpark, the relayed
scheduler). Within a stair rows are free: where the search takes drafts at all, it fills the stair.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from engine.config import EngineConfig
from engine.device_rounds.round import Size
from engine.schedule.books import most_tokens
from engine.schedule.policies import AdaptiveLengths, AutoLengths, LengthPolicy, StaticLengths
from engine.types import Sequence, SpeculationMode

Array = np.ndarray
PARTS = 4  # stairs between no draft and whole blocks
ASKED = 2.0**20  # weight of a token that its request, or the policy, wants verified whatever others promise
FIRST_REST, LONGEST_REST = 16, 256  # rounds without drafts before `auto` tries one again
_GAIN = 0.1  # of a measured round, in what a size is believed to take
_NOTHING = np.zeros(0)


def staircase(most: int, block: int, max_rows: int = 1 << 30) -> tuple[Size, ...]:
    """Sizes for up to `most` sequences, largest first: seats by powers of two, drafts to verify by quarters of γ.

    Args:
        max_rows: of a round in which somebody drafts.
    """
    seats = [1 << k for k in range(most.bit_length()) if 1 << k < most] + [most]
    sizes = {Size(r, r, False) for r in seats}
    if block:
        sizes |= {Size(r, r + -(-r * block * part // PARTS), True) for r in seats for part in range(1, PARTS + 1)}
    sizes = {size for size in sizes if size.rows <= max_rows or not size.drafts}
    return tuple(sorted(sizes, key=lambda size: (size.rows, size.drafts, size.seats), reverse=True))


class Wish(NamedTuple):
    """What a sequence may have verified."""

    most: int  # draft tokens; 0: none
    asked: bool  # all of them, as far as `threshold` lets it: the request or the policy says so
    threshold: float  # 0: whatever the confidence


def wish(sequence: Sequence, policy: LengthPolicy | None, config: EngineConfig, block: int, confident: bool) -> Wish:
    """By the request's own speculation options, else by the policy.

    Args:
        confident: whether the drafter hands out confidences.
    """
    own = sequence.request.speculation
    if policy is None or own.mode is SpeculationMode.OFF or not sequence.followed:
        return Wish(0, False, 0.0)
    most, mode = most_tokens(sequence.request, policy, block), own.mode
    if mode is SpeculationMode.AUTO:
        if not isinstance(policy, StaticLengths):
            return Wish(most, False, 0.0)
        mode = policy.mode
    if mode is SpeculationMode.FIXED:
        if own.draft_tokens is None and config.draft_tokens is not None:
            most = min(most, config.draft_tokens)
        return Wish(most, True, 0.0)
    wanted = config.confidence_threshold if own.confidence_threshold is None else own.confidence_threshold
    return Wish(most, True, wanted if confident else 0.0)


class Sizing:
    """Chooses sizes.

    Args:
        guess: seconds of a size that was never measured; only the ratios count once one was.
    """

    def __init__(self, sizes: Iterable[Size], guess: Callable[[Size], float]) -> None:
        self.sizes = tuple(sizes)
        self._seats = sorted({size.seats for size in self.sizes})
        drafting = sorted(size for size in self.sizes if size.drafts)
        self._stairs = {seats: [size for size in drafting if size.seats == seats] for seats in self._seats}
        self._guess = guess
        self._base: dict[Size, float] = {}
        self._own: dict[Size, float] = {}  # log of what it lately took beside its base
        self._speed = 0.0  # the same over all sizes
        self.gains: Array = _NOTHING  # weighted survivals of the last drafts read, falling
        self._rested = 0
        self._rest = FIRST_REST

    @property
    def knows(self) -> bool:
        """Whether any drafts have been read."""
        return len(self.gains) > 0

    def seconds(self, size: Size) -> float:
        """What a round of this size is believed to take."""
        return self._base_s(size) * math.exp(self._own.get(size, self._speed))

    def _base_s(self, size: Size) -> float:
        if size not in self._base:
            self._base[size] = max(self._guess(size), 1e-9)
        return self._base[size]

    def measured(self, size: Size, seconds: float) -> None:
        """What the size took while nobody was served: its base from now on."""
        self._base[size] = max(seconds, 1e-9)

    def learn(self, size: Size, seconds: float) -> None:
        """Take in a round; a stall counts as much as a round twice as slow."""
        found = math.log(max(seconds, 1e-9) / self._base_s(size))
        own = self._own.get(size)
        if own is None:
            first = not self._own
            self._own[size] = found
            self._speed = found if first else self._speed + _GAIN * (found - self._speed)
            return
        self._own[size] = own + _GAIN * max(min(found - own, 1.0), -1.0)
        self._speed += _GAIN * max(min(found - self._speed, 1.0), -1.0)

    def read(self, gains: Array) -> None:
        """Weighted survivals of a round's drafts, of those that leave the choice."""
        self.gains = np.sort(gains)[::-1]

    def seats(self, count: int) -> int:
        """The fewest seats of a size that has `count`."""
        return self._seats[bisect_left(self._seats, count)]

    def choose(
        self, seats: int, tokens: float, policy: LengthPolicy | None, asked: int, willing: int
    ) -> tuple[Size, int]:
        """The size of the next round, and its budget.

        Args:
            seats: that it must have.
            tokens: weighted tokens that it brings without drafts.
            asked: draft tokens that must be verified, as far as they pass their thresholds.
            willing: most draft tokens that could be verified besides.
        """
        row = self.seats(seats)
        plain = Size(row, row, False)
        stairs = self._stairs[row]
        if policy is None or not stairs or not (asked or willing):
            return plain, 0
        fitting = [size for size in stairs if size.room >= asked] or stairs[-1:]
        if not willing or not isinstance(policy, AdaptiveLengths):
            return fitting[0], fitting[0].room
        adaptive = isinstance(policy, AutoLengths)
        if not self.knows:  # nothing to go by: `auto` looks at a few, `relayed` verifies nothing
            return fitting[0], fitting[0].room if adaptive else asked
        reach = np.concatenate([[0.0], np.cumsum(self.gains)])
        best, budget, rate = fitting[0], asked, tokens / self.seconds(fitting[0])
        if adaptive and not asked:
            best, budget, rate = plain, 0, tokens / self.seconds(plain)
        for size in fitting:
            free = min(size.room - asked, willing, len(reach) - 1)
            reached = (tokens + reach[max(free, 0)]) / self.seconds(size)
            if reached > rate:
                best, budget, rate = size, size.room, reached
        return self._try(best, budget, fitting[0])

    def _try(self, best: Size, budget: int, smallest: Size) -> tuple[Size, int]:
        """Now and then a draft after all, to see whether it would pay by now."""
        if best.drafts:
            self._rested, self._rest = 0, FIRST_REST
            return best, budget
        self._rested += 1
        if self._rested <= self._rest:
            return best, budget
        self._rested, self._rest = 0, min(2 * self._rest, LONGEST_REST)
        return smallest, smallest.room
