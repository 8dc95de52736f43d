"""Whether the batch drafts: when that begins, and when it ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.schedule import native_books as b
from engine.schedule.cost import CostTable, LiveCost
from engine.schedule.native_judge import GAIN, STAY, judge

BLOCK, REQUESTS = 5, 4
TABLE = CostTable(
    verify=((1.0, 1e-3), (256.0, 6.1e-3)), draft=((1.0, 3e-4), (64.0, 6.6e-3)), absorb=((1.0, 1e-5), (256.0, 2e-4))
)


class Batch:
    """Requests that all draft equally well, judged again and again."""

    def __init__(self, table: CostTable = TABLE) -> None:
        self.cost = LiveCost(table, 256)
        self.memory = np.zeros(b.MEMORY)
        self.whole = np.zeros((REQUESTS, b.WHOLE), np.int64)
        self.whole[:, b.BLOCKS_SEEN] = b.BLOCKS
        self.real = np.ones((REQUESTS, b.REAL))

    def drafts(self, conditional: float) -> bool:
        """Whether anybody drafts where so many of the next draft tokens are kept."""
        curves = np.tile(conditional ** np.arange(1, BLOCK + 1), (REQUESTS, b.BLOCKS, 1))
        classes = np.zeros((b.BANDS * b.LEVELS, b.CLASS_BLOCKS, BLOCK))
        places, contexts = np.arange(REQUESTS), np.full(REQUESTS, 100)
        given = places, places, contexts, np.full(REQUESTS, BLOCK), self.whole, self.real, curves, classes
        counts = np.zeros(len(classes), np.int64)
        plain_s = self.cost.rows_s(REQUESTS)
        judge(*given, counts, self.memory, *self.cost.arrays, REQUESTS, float(REQUESTS), plain_s)
        drafting = self.whole[:, b.DRAFTING]
        assert bool(self.memory[b.OPEN]) == bool(drafting.any())
        ordinary = REQUESTS / (plain_s + self.memory[b.KEEPING_S])
        assert STAY * ordinary < self.memory[b.PRICE]
        assert self.memory[b.PRICE] == pytest.approx(ordinary) or drafting.any()
        return bool(drafting.any())


def test_drafting_that_has_begun_goes_on_until_it_loses_what_beginning_again_would_take() -> None:
    batch, rates = Batch(), np.arange(0.3, 0.9, 0.005)
    begins = next(rate for rate in rates if batch.drafts(rate))
    price, ordinary = batch.memory[b.PRICE], REQUESTS / batch.cost.rows_s(REQUESTS)
    assert GAIN <= price / ordinary < GAIN + 0.02
    ends = next(rate for rate in reversed(rates) if not batch.drafts(rate))
    assert 0.02 < begins - ends < 0.1
    assert not batch.drafts(begins - 0.01) and batch.drafts(begins)


def test_rounds_that_keep_features_are_dearer() -> None:
    """Who is followed pays for that in rounds without drafts, too: drafting need not earn it."""
    batch, rates = Batch(), np.arange(0.3, 0.9, 0.005)
    begins = next(rate for rate in rates if batch.drafts(rate))
    keeping = Batch()
    keeping.memory[b.KEEPING_S] = 0.08 * keeping.cost.rows_s(REQUESTS)
    assert next(rate for rate in rates if keeping.drafts(rate)) < begins - 0.01


def test_whoever_drafts_worst_sits_out_alone() -> None:
    batch = Batch(replace(TABLE, draft=((1.0, 1e-4), (64.0, 6.6e-3))))
    batch.real[2, b.WEIGHT] = 0.1
    assert batch.drafts(0.7)
    assert batch.whole[:, b.DRAFTING].tolist() == [1, 1, 0, 1]
