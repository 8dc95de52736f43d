"""The planner's memory: who it keeps books of, and which rounds teach it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.schedule import native_desk
from engine.types import Phase
from tests.engine.helpers import FIXED, OFF, load, request

Drafters = Callable[..., Path]


def test_of_plain_rounds_that_are_alike_one_in_four_teaches(target_dir: Path) -> None:
    engine = load(target_dir, policy="plain")
    engine.submit(request("a", (3, 1, 4), 190))
    while not engine.running or engine.running[0].phase is not Phase.DECODE:
        engine.step()
    cost = engine.scheduler.cost
    for _ in range(30):
        engine.step()
    before = cost._observed
    for _ in range(80):
        engine.step()
    assert cost._observed - before == 20
    records = engine.history.last(80)
    assert all(r.measured_s > 0 and r.predicted_s > 0 and r.tokens == 1 for r in records), "all are recorded"
    contexts = [r.requests[0].context for r in records]
    assert contexts == list(range(contexts[0], contexts[0] + 80))
    engine.submit(request("b", (1, 5, 9), 60))
    before = cost._observed
    for _ in range(10):
        engine.step()
    assert cost._observed - before == 10, "another request: nothing is alike"


def test_rounds_with_drafts_all_teach(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir())
    engine.submit(request("a", (3, 1, 4), 150, speculation=FIXED))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.cost._observed == engine.rounds


def test_native_code_finds_the_books_when_they_have_grown(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), max_running=40)
    planner = engine.scheduler.planner
    first = planner.desk
    for number in range(40):
        engine.submit(request(str(number), (number, 7), 30, speculation=FIXED if number % 2 else OFF))
    for _ in range(12):
        engine.step()
    assert len(planner.books.whole) >= 40 and planner.desk is not first
    arrays = (planner.books.whole, planner.books.real, planner.books.curves)
    for index, array in zip((native_desk.WHOLE, native_desk.REAL, native_desk.CURVES), arrays, strict=True):
        at = index * native_desk.WORDS
        assert planner.desk[at] == array.ctypes.data
        np.testing.assert_array_equal(planner.desk[at + 1 : at + 1 + array.ndim], array.shape)
    while engine.has_work:
        engine.step()
    engine.check()
