"""What a round reads and leaves, as tensors that never move: a graph remembers addresses, not values.

A running sequence has a *seat*: one column of `whole` and `real`, and the row `1 + seat` of the page table. Between
rounds a seat holds what its sequence does: anchor, cached positions, proposal counter. The host changes seats only
through `Edits`, in the order of the stream; rounds change them only through `round.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch

from engine.sampling import sampling_rows
from engine.types import Sequence
from kernels.filters import SamplingRows

_ALIGN = 16  # entries: Triton compiles a kernel anew for a pointer that is not aligned


class Whole(IntEnum):
    """Rows of `RoundState.whole`, int64."""

    ACTIVE = 0  # 1: somebody sits here
    ANCHOR = 1  # the last committed token
    LENGTH = 2  # positions in the caches; the anchor's position
    PROPOSALS = 3  # blocks drafted so far
    END = 4  # tokens at which max_tokens or the context ends it
    MOST = 5  # draft tokens that it may have verified
    SEED = 6
    TOP_K = 7
    COUPLED = 8


class Real(IntEnum):
    """Rows of `RoundState.real`, float32; behind them γ shifts and γ slopes of the confidences' logits."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    WEIGHT = 3
    THRESHOLD = 4  # verify while confidence is at least this


class Found(IntEnum):
    """Rows of `RoundState.found`, int64: what a round did at each seat. Behind them its γ drafted tokens."""

    STATE = 0  # `Fate`
    ACCEPTED = 1
    NEXT = 2
    VERIFIED = 3


class Fate(IntEnum):
    """What became of a seat in a round."""

    IDLE = 0  # nobody sits here, or the sequence has reached its end
    WENT_ON = 1
    FAILED = 2  # the target's logits were not finite


class RoundState:
    """Seats, page table, budget and results.

    Args:
        seats: most sequences at once.
        width: pages of the longest sequence.
        block: γ; 0 without a drafter.
        scratch_page: a page of all caches that no sequence ever holds: rows of nobody write there.
    """

    def __init__(self, seats: int, width: int, block: int, scratch_page: int, device: torch.device) -> None:
        self.seats, self.block, self.scratch_page = seats, block, scratch_page
        self.width = width + width % 2
        columns = -(-seats // _ALIGN) * _ALIGN
        sizes = (len(Whole) * columns, (columns + 1) * self.width, 1)
        self.words = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        whole, table, self.budget = self.words.split_with_sizes(sizes)  # budget [1]: draft tokens to verify in all
        self.whole = whole.view(len(Whole), columns)
        self.table = table.view(columns + 1, self.width)  # row 0 is nobody's
        self.table.fill_(scratch_page)
        self.numbers = torch.zeros((len(Real) + 2 * block) * columns, device=device)
        self.real = self.numbers.view(-1, columns)
        self.found = torch.zeros((len(Found) + block, columns), dtype=torch.int64, device=device)
        self.confidence = torch.zeros((block, columns), device=device)
        self._columns = columns
        self._table_at = sizes[0]
        self._budget_at = sizes[0] + sizes[1]

    def sampling(self, seats: int) -> SamplingRows:
        """How the first seats sample. Everything that a row may ask for is prepared for: nobody looks at values."""
        whole, real = self.whole[:, :seats], self.real[:, :seats]
        rows = SamplingRows(
            real[Real.TEMPERATURE],
            whole[Whole.TOP_K],
            real[Real.TOP_P],
            real[Real.MIN_P],
            whole[Whole.SEED],
            whole[Whole.COUPLED] != 0,
        )
        vars(rows)["any_filter"] = vars(rows)["any_rejection"] = True
        return rows

    def whole_at(self, row: Whole, seat: int) -> int:
        """Where an entry lies in `words`."""
        return row * self._columns + seat

    def real_at(self, row: int, seat: int) -> int:
        """Where an entry lies in `numbers`."""
        return row * self._columns + seat

    def page_at(self, seat: int, place: int) -> int:
        """Where a page of a sequence stands in `words`."""
        return self._table_at + (1 + seat) * self.width + place

    @property
    def budget_at(self) -> int:
        return self._budget_at


class Edits:
    """What the host changes before the next round: the last value of each entry counts."""

    def __init__(self, state: RoundState) -> None:
        self.state = state
        self.words: dict[int, int] = {}
        self.numbers: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self.words or self.numbers)

    def leave(self, seat: int) -> None:
        self.words[self.state.whole_at(Whole.ACTIVE, seat)] = 0

    def sit(self, seat: int, sequence: Sequence, end: int, most: int) -> None:
        """Everything of a sequence that the host knows to the last token."""
        state, rows = self.state, sampling_rows((sequence,), torch.device("cpu"))
        whole = {
            Whole.ACTIVE: 1,
            Whole.ANCHOR: sequence.anchor,
            Whole.LENGTH: sequence.kv_length,
            Whole.PROPOSALS: sequence.proposals,
            Whole.END: end,
            Whole.MOST: most,
            Whole.SEED: int(rows.seed[0]),
            Whole.TOP_K: int(rows.top_k[0]),
            Whole.COUPLED: int(rows.coupled[0]),
        }
        real = {Real.TEMPERATURE: rows.temperature, Real.TOP_P: rows.top_p, Real.MIN_P: rows.min_p}
        self.words.update((state.whole_at(row, seat), value) for row, value in whole.items())
        self.numbers.update((state.real_at(row, seat), float(value[0])) for row, value in real.items())

    def pages(self, seat: int, first: int, pages: Iterable[int]) -> None:
        """Pages of a sequence from its `first` one on."""
        at = self.state.page_at(seat, first)
        self.words.update(enumerate(pages, at))

    def judge(self, seat: int, weight: float, threshold: float) -> None:
        """What one of its tokens counts, and how sure a drafted one must be."""
        self.numbers[self.state.real_at(Real.WEIGHT, seat)] = weight
        self.numbers[self.state.real_at(Real.THRESHOLD, seat)] = threshold

    def correct(self, seat: int, lines: np.ndarray) -> None:
        """Shift and slope [γ, 2] of its confidences' logits."""
        state = self.state
        for k, (shift, slope) in enumerate(lines.tolist()):
            self.numbers[state.real_at(len(Real) + k, seat)] = shift
            self.numbers[state.real_at(len(Real) + state.block + k, seat)] = slope

    def spend(self, budget: int) -> None:
        """Draft tokens that the next rounds verify."""
        self.words[self.state.budget_at] = budget
