"""Sheets (`native_sheet`) as Python writes and reads them: written in every round, read where somebody asks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.schedule import native_sheet as n
from engine.types import Sequence

Array = np.ndarray


class Sheet:
    """Of those that decode in a round.

    Args:
        words: HEAD and COLUMNS · count of them.
    """

    __slots__ = ("count", "words")

    def __init__(self, words: array[int], count: int) -> None:
        self.words, self.count = words, count

    @classmethod
    def of(cls, slots: list[int], weights: list[float]) -> Sheet:
        """One on which nothing stands yet but who decodes, and what their tokens count."""
        count = len(slots)
        sheet = cls(array("q", bytes(n.WORD * (n.HEAD + n.COLUMNS * count))), count)
        sheet.put(n.SLOT, slots)
        sheet.weigh(weights)
        return sheet

    def copy(self) -> Sheet:
        return Sheet(self.words[:], self.count)

    @property
    def address(self) -> int:
        return self.words.buffer_info()[0]

    def put(self, column: int, values: Iterable[int]) -> None:
        """Write columns from this one on."""
        written = array("q", values)
        first = n.HEAD + column * self.count
        self.words[first : first + len(written)] = written

    def weigh(self, weights: list[float]) -> None:
        self.put(n.WEIGHT, memoryview(array("d", weights)).cast("B").cast("q"))

    def column(self, column: int) -> array[int]:
        first = n.HEAD + column * self.count
        return self.words[first : first + self.count]

    @property
    def weights(self) -> Array:
        first = n.HEAD + n.WEIGHT * self.count
        return np.frombuffer(self.words)[first : first + self.count]

    def runs_as(self, other: Sheet) -> None:
        """The round runs what that one did."""
        self.words[: n.HEAD] = other.words[: n.HEAD]

    @property
    def work(self) -> Array:
        """`native_cost`'s words."""
        return np.frombuffer(self.words)[: n.HEAD]


@dataclass(slots=True)
class Blocks:
    """What was drafted in a round, D blocks of L tokens, in the order of `sequences`."""

    sequences: tuple[Sequence, ...]
    length: int  # L
    words: array[int]
    stop: int = 0  # `native_lengths`

    @classmethod
    def of(cls, sequences: tuple[Sequence, ...], length: int) -> Blocks:
        """Room for them."""
        size = (n.BLOCK_COLUMNS + 3 * length) * len(sequences)
        return cls(sequences, length, array("q", bytes(n.WORD * size)))

    @property
    def address(self) -> int:
        return self.words.buffer_info()[0]

    def column(self, column: int) -> Array:
        count = len(self.sequences)
        return np.frombuffer(self.words, np.int64)[column * count : (column + 1) * count]

    @property
    def slots(self) -> Array:
        """[D] rows of the books."""
        return self.column(n.SLOT)

    @property
    def contexts(self) -> Array:
        return self.column(n.CONTEXT)

    @property
    def limits(self) -> Array:
        return self.column(n.BLOCK_LIMIT)

    @property
    def lengths(self) -> Array:
        """ℓ; 0 of a request that left the round."""
        return self.column(n.LENGTH)

    @property
    def kept(self) -> Array:
        return self.column(n.KEPT)

    @property
    def curves(self) -> Array:
        """[3, D, L]: calibrated confidences, their logits, and corrected cumulative survivals."""
        count = len(self.sequences)
        return np.frombuffer(self.words)[n.BLOCK_COLUMNS * count :].reshape(3, count, self.length)

    @property
    def conditional(self) -> Array:
        return self.curves[n.CONDITIONAL]

    @property
    def logits(self) -> Array:
        return self.curves[n.LOGIT]

    @property
    def survival(self) -> Array:
        return self.curves[n.SURVIVAL]

    def chosen(self) -> list[int]:
        """The lengths, as a list."""
        count = len(self.sequences)
        return self.words[n.LENGTH * count : n.KEPT * count].tolist()

    def settle(self, kept: list[int]) -> None:
        """Write how much of each was kept."""
        first = n.KEPT * len(kept)
        for row, luck in enumerate(kept, first):
            self.words[row] = luck
