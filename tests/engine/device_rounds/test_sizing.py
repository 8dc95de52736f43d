"""The staircase, and which stair a round gets."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.device_rounds.round import Size
from engine.device_rounds.sizing import FIRST_REST, Sizing, staircase
from engine.schedule.policies import LengthPolicy, make_policy

BLOCK = 4


def policy(name: str) -> LengthPolicy | None:
    return make_policy(EngineConfig(model="", policy=name))


def sizing(per_row: float = 0.1, draft: float = 0.1) -> Sizing:
    """Rounds of a second, and so much a row beside it."""
    return Sizing(staircase(8, BLOCK), lambda size: 1.0 + per_row * size.rows + draft * size.drafts)


def test_the_staircase() -> None:
    sizes = staircase(6, BLOCK)
    assert {size.seats for size in sizes} == {1, 2, 4, 6}
    assert [size.rows for size in sizes if size.seats == 4 and size.drafts] == [20, 16, 12, 8]
    assert [size.rows for size in sizes if not size.drafts] == [6, 4, 2, 1]
    assert [size.rows for size in staircase(1, 7) if size.drafts] == [8, 7, 5, 3]
    assert all(not size.drafts for size in staircase(6, 0))
    assert sizes[0] == Size(6, 30, True)
    few = staircase(6, BLOCK, max_rows=14)
    assert max(size.rows for size in few) == 12 and {size.seats for size in few} == {1, 2, 4, 6}


def test_plain_rounds_have_a_row_a_seat() -> None:
    assert sizing().choose(3, 3.0, None, 0, 0) == (Size(4, 4, False), 0)
    assert sizing().choose(3, 3.0, policy("auto"), 0, 0) == (Size(4, 4, False), 0)


def test_fixed_lengths_get_all_the_rows_they_ask_for() -> None:
    size, budget = sizing().choose(8, 3.0, policy("fixed"), 11, 0)
    assert size == Size(8, 24, True) and budget == 16


def test_relayed_verifies_nothing_until_confidences_are_two_rounds_old() -> None:
    mine = sizing()
    assert mine.choose(4, 4.0, policy("relayed"), 0, 16) == (Size(4, 8, True), 0)
    mine.read(np.full(16, 0.9))
    assert mine.choose(4, 4.0, policy("relayed"), 0, 16) == (Size(4, 20, True), 16)


@pytest.mark.parametrize(("gain", "rows"), [(0.9, 20), (0.01, 8)])
def test_the_budget_is_what_brings_most_tokens_a_second(gain: float, rows: int) -> None:
    mine = sizing(per_row=0.1)
    mine.read(np.full(16, gain))
    size, budget = mine.choose(4, 4.0, policy("relayed"), 0, 16)
    assert size.rows == rows and budget == size.room, "within a stair rows are free"


def test_falling_gains_end_where_rows_cost_more() -> None:
    mine = sizing(per_row=0.2)
    mine.read(np.array([0.99] * 4 + [0.95] * 4 + [0.02] * 8))
    assert mine.choose(4, 4.0, policy("relayed"), 0, 16)[0].rows == 12


def test_auto_drafts_where_that_pays_and_looks_again_now_and_then() -> None:
    mine = sizing(per_row=1.0, draft=5.0)
    auto = policy("auto")
    size, budget = mine.choose(4, 4.0, auto, 0, 16)
    assert size.drafts and budget == size.room, "the first drafts tell"
    mine.read(np.full(16, 0.05))
    chosen = [mine.choose(4, 4.0, auto, 0, 16)[0].drafts for _ in range(4 * FIRST_REST)]
    assert chosen[:FIRST_REST] == [False] * FIRST_REST and chosen[FIRST_REST]
    assert sum(chosen) == 2, "and ever more rarely"
    cheap = sizing(per_row=0.0, draft=0.0)
    cheap.read(np.full(16, 0.5))
    assert all(cheap.choose(4, 4.0, auto, 0, 16)[0].rows == 20 for _ in range(50))


def test_requests_that_ask_come_before_those_that_share() -> None:
    mine = sizing(per_row=1.0)
    mine.read(np.full(12, 0.01))
    size, budget = mine.choose(4, 4.0, policy("auto"), 4, 12)
    assert size == Size(4, 8, True) and budget == 4


def test_what_rounds_take_corrects_what_is_believed() -> None:
    mine = sizing()
    size, other = Size(4, 8, True), Size(4, 12, True)
    before = mine.seconds(other) / mine.seconds(size)
    mine.learn(size, 0.01)
    assert mine.seconds(size) == pytest.approx(0.01)
    assert mine.seconds(other) / mine.seconds(size) == pytest.approx(before), "sizes keep their proportions"
    for _ in range(100):
        mine.learn(size, 0.02)
    assert mine.seconds(size) == pytest.approx(0.02, rel=0.01)
    mine.learn(size, 2.0)
    assert mine.seconds(size) < 0.025, "one stall is no news"
    fresh = sizing()
    fresh.measured(size, 0.5)
    assert fresh.seconds(size) == pytest.approx(0.5)
