"""What a round costs on this machine: a table measured at start, corrected by every round since.

Seconds are additive: verification by rows (host work included), drafting by blocks, absorbing by rows, and what
context adds to each. Knows nothing of confidences; `measure.py` fills the table, `store.py` keeps it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise

import numpy as np

from engine.schedule import native_cost

Array = np.ndarray
Knots = tuple[tuple[float, float], ...]  # (rows, seconds), both increasing


@dataclass(frozen=True, slots=True)
class Work:
    """What one round runs; counts, and tokens of context summed."""

    requests: int = 0  # that decode
    rows: int = 0  # decode rows: Σ (1 + ℓ)
    context: int = 0  # Σ of the decoding requests' cached tokens
    row_context: int = 0  # Σ ℓ · cached tokens: what the drafted rows attend to once more
    prefill: int = 0  # prompt rows
    drafting: int = 0  # blocks drafted
    draft_context: int = 0  # Σ of the drafting requests' cached tokens
    absorbed: int = 0  # rows whose features the drafter took in
    draft_share: float = 1.0  # of each block's slots, those drafted
    caught_up: int = 0  # rows that had waited, absorbed before in a pass of their own


def work_of(values: Array) -> Work:
    """From `native_cost`'s order."""
    counts = [int(value) for value in values]
    return replace(Work(*counts), draft_share=float(values[native_cost.DRAFT_SHARE]))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that the stages of a round took."""

    draft: float = 0.0
    verify: float = 0.0  # everything but drafting and absorbing: scheduling, target, commit
    absorb: float = 0.0

    @property
    def total(self) -> float:
        return self.draft + self.verify + self.absorb


@dataclass(frozen=True, slots=True)
class CostTable:
    """T(R, B, context, drafting, prefill) in seconds, a sum of measured parts.

    Args:
        verify: by effective rows of the target's pass, one request; a prompt row counts `prefill_row` of a row.
        request_s: what every further decoding request adds, host work mostly.
        context_s, row_context_s: a token of context, for a request and for each of its drafted rows.
        draft, absorb: by blocks and by rows; draft_context_s a token of context of a drafting request.
        draft_slots: the share of drafting that grows with the slots drafted of each block.
        drafted_s: what a round with drafts takes besides, however few: the host's work.
    """

    verify: Knots
    request_s: float = 0.0
    context_s: float = 0.0
    row_context_s: float = 0.0
    prefill_row: float = 1.0
    draft: Knots = ((0.0, 0.0),)
    draft_context_s: float = 0.0
    absorb: Knots = ((0.0, 0.0),)
    draft_slots: float = 0.0
    drafted_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            knots = value if isinstance(value, tuple) else ((0.0, value),)
            if not knots or any(not (math.isfinite(x) and math.isfinite(y) and x >= 0 and y >= 0) for x, y in knots):
                raise ValueError(f"cost table: {field.name} must hold finite values of at least 0, got {value}")
            if any(b[0] <= a[0] or b[1] < a[1] for a, b in pairwise(knots)):
                raise ValueError(f"cost table: {field.name} must increase, got {value}")
        if self.draft_slots > 1:
            raise ValueError(f"cost table: draft_slots is a share of at most 1, got {self.draft_slots}")
        if self.verify[-1][1] <= 0:
            raise ValueError("cost table: a round cannot take no time at all")

    def times(self, work: Work) -> Times:
        """Predicted seconds of each stage."""
        verify = interpolate(self.verify, work.rows + self.prefill_row * work.prefill)
        verify += self.request_s * work.requests + self.context_s * work.context
        verify += self.row_context_s * work.row_context + (self.drafted_s if work.drafting else 0.0)
        draft = interpolate(self.draft, work.drafting) + self.draft_context_s * work.draft_context
        draft *= 1 - self.draft_slots * (1 - work.draft_share)
        return Times(
            draft if work.drafting else 0.0, verify, self.absorb_s(work.caught_up) + self.absorb_s(work.absorbed)
        )

    def absorb_s(self, rows: int) -> float:
        return interpolate(self.absorb, rows) if rows else 0.0

    def seconds(self, work: Work) -> float:
        return self.times(work).total


def interpolate(knots: Knots, x: float) -> float:
    """Piecewise linear; beyond the last knot the last slope goes on, below the first one its value stands."""
    i = bisect_left(knots, (x,))
    if i == 0:
        return knots[0][1]
    if i == len(knots):
        if len(knots) == 1:
            return knots[0][1]
        i -= 1
    (x0, y0), (x1, y1) = knots[i - 1], knots[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def increasing(points: Iterable[tuple[float, float]]) -> Knots:
    """The closest non-decreasing knots through noisy points (pool adjacent violators); equal x are averaged first."""
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(max(y, 0.0))
    pools: list[list[float]] = []  # sum, count
    members: list[list[float]] = []
    for x in sorted(by_x):
        pools.append([sum(by_x[x]) / len(by_x[x]), 1.0])
        members.append([x])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
            last = members.pop()
            members[-1] += last
    return tuple((x, total / count) for (total, count), xs in zip(pools, members, strict=True) for x in xs)


def nominal(block_size: int, max_rows: int) -> CostTable:
    """Where nothing was measured: a row adds a fifth of a round, a block costs what half of its rows would.

    Only the ratios matter, and the first rounds correct them.
    """
    base, row = 1e-3, 2e-4
    per_block = 0.5 * block_size * row
    top = float(max(max_rows, 2))
    return CostTable(
        verify=((1.0, base), (top, base + row * (top - 1))),
        draft=((1.0, per_block), (top, per_block * top)),
        absorb=((1.0, row / 20), (top, row / 20 * top)),
    )


_REFRESH = 16  # observations between two updates of the curve by rows


class LiveCost:
    """A cost table and what the rounds so far say about it (`native_cost`). Looks at past rounds alone.

    Args:
        max_rows: the most rows that a round may hold.
    """

    def __init__(self, table: CostTable, max_rows: int) -> None:
        self.max_rows = max(max_rows, 2)
        self.replace(table)

    def replace(self, table: CostTable) -> None:
        """Start again from another table."""
        self.table = table
        sizes = [float(x) for x in range(self.max_rows + 1)]
        self.base = np.array(
            [[interpolate(knots, x) for x in sizes] for knots in (table.verify, table.draft, table.absorb)]
        )
        self.rates = np.array(
            [
                *(table.request_s, table.context_s, table.row_context_s),
                *(table.prefill_row, table.draft_context_s, table.draft_slots, table.drafted_s),
            ]
        )
        self.drift = np.zeros((native_cost.PROMPT + 1, native_cost.SPEED + 1))
        self.curve = np.zeros(self.max_rows + 1)
        self.arrays = self.base, self.drift, self.curve, self.rates  # changed in place from here on
        self.refresh()
        self._observed = 0

    def rows_s(self, rows: float) -> float:
        """Seconds of a pass over `rows` effective rows."""
        return float(self.curve[min(round(rows), self.max_rows)])

    @property
    def speed(self) -> float:
        """How much slower than the table rounds are now."""
        return math.exp(self.drift[native_cost.VERIFY, native_cost.SPEED])

    def draft_s(self, blocks: int, context: int) -> float:
        """Seconds that drafting adds to a round."""
        return self.times(Work(drafting=blocks, draft_context=context)).draft

    def absorb_s(self, rows: int) -> float:
        return self.times(Work(absorbed=rows)).absorb

    def times(self, work: Work) -> Times:
        """Predicted seconds of each stage, corrected."""
        found = np.empty(3)
        native_cost.predict(*self.arrays, np.array(astuple(work), dtype=np.float64), found)
        return Times(
            float(found[native_cost.DRAFT]), float(found[native_cost.VERIFY]), float(found[native_cost.ABSORB])
        )

    def observe(self, work: Work, measured: Times, check: bool = False) -> None:
        """Learn from a finished round."""
        stages = np.array([measured.verify, measured.draft, measured.absorb])
        native_cost.observe(*self.arrays, np.array(astuple(work), dtype=np.float64), stages, self.due(), check)

    def stood_still(self) -> None:
        """The drafts of the round that is observed next, if it has any, were made under worse conditions than those to
        come: they teach an upper bound alone."""
        row = self.drift[native_cost.SEEN]
        row[native_cost.WARM] = min(row[native_cost.WARM], native_cost.WARMED - 1)

    def refresh(self) -> None:
        """Correct the curve by rows now; otherwise that happens every few rounds."""
        native_cost.renew(*self.arrays[:3])

    def due(self) -> bool:
        """Counts a finished round: whether it is time to correct the curve by rows."""
        self._observed += 1
        return self._observed % _REFRESH == 0


def median(values: Sequence[float]) -> float:
    """The middle one; 0 of none."""
    return float(np.median(values)) if values else 0.0
