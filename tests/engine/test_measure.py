"""What is measured at start, and what rounds then teach of it: shapes alone, stairs, what drafts take besides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.engine import Engine
from engine.schedule import measure as measuring
from engine.schedule.cost import LiveCost, Times, Work
from engine.schedule.fit import Sample, fit
from engine.schedule.measure import measure
from engine.schedule.record import RequestRecord, RoundRecord, Sitting, Stop
from tests.engine.helpers import load
from tests.engine.test_cost import TABLE

Drafters = Callable[..., Path]


def test_no_prompt_runs_amid_measured_rounds(
    target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that draft are followed from their beginning: sent back, they would run their prompts once more."""
    engine = load(target_dir, drafter_dir(), policy="auto", max_running=4)
    found: list[Sample] = []
    inner = measuring._visit

    def watched(*args: object) -> list[Sample]:
        samples = inner(*args)  # type: ignore[arg-type]
        found.extend(samples)
        return samples

    monkeypatch.setattr(measuring, "_visit", watched)
    monkeypatch.setattr(measuring, "MOST_VISITS", 1)
    measure(engine, 60.0)
    assert {sample.requests for sample in found} >= {1, 4}
    for sample in found:
        assert not sample.record.prefill_rows and len(sample.record.requests) == sample.requests
        drafted = [request.drafted > 0 for request in sample.record.requests]
        assert all(drafted) if sample.length != -1 else not any(drafted)
    assert not engine.has_work and isinstance(engine, Engine)


def sample(requests: int, length: int, seconds: float, context: int = 24) -> Sample:
    one = RequestRecord("r", Sitting.ASKED, 1.0, 24, max(length, 0), max(length, 0), 0, ())
    drafted = length > 0
    record = RoundRecord(
        *(1, "fixed", requests, 0, 0, requests * max(length, 0), requests * max(length, 0), 0.0, 0, requests, seconds),
        *(seconds, 5e-4 if drafted else 0.0, seconds, 1e-4 if drafted else 0.0, 0.0, 1.0, Stop.RULE, (one,) * requests),
    )
    return Sample(requests, length, context, record)


def test_what_a_round_with_drafts_takes_besides_is_no_price_of_rows() -> None:
    """Rows take 0.02 ms each, a round with drafts 0.2 more: that, and no more, is what drafts take besides."""

    def seconds(requests: int, length: int) -> float:
        return 1e-3 + 2e-5 * requests * (1 + max(length, 0)) + (2e-4 if length > 0 else 0.0)

    cells = [(n, length) for n in (1, 2, 4, 8) for length in (-1, 1, 3, 5, 7)]
    table = fit([sample(n, length, seconds(n, length)) for n, length in cells for _ in range(3)], [], 7)
    assert table.drafted_s == pytest.approx(2e-4, rel=0.05)
    row_s = (table.times(Work(1, 8)).verify - table.times(Work(1, 2)).verify) / 6
    assert row_s == pytest.approx(2e-5, rel=0.15)
    drafts = Work(4, 16, drafting=4)
    assert table.times(drafts).verify == pytest.approx(seconds(4, 3), rel=0.03)
    live = LiveCost(table, 128)
    assert live.times(drafts).verify == pytest.approx(table.times(drafts).verify)
    for _ in range(300):  # and who measures what was foretold learns nothing
        live.observe(drafts, table.times(drafts))
    assert live.times(Work(4, 4)).verify == pytest.approx(table.times(Work(4, 4)).verify, rel=0.01)


def test_one_row_more_than_fills_the_tiles_begins_another() -> None:
    cells = [(1, length) for length in (-1, 1, 3, 5, 7)] + [(4, length) for length in (-1, 1, 3, 4, 5, 7)]

    def seconds(requests: int, length: int) -> float:
        tiles = -(-requests * (1 + max(length, 0)) // 16)
        return 1e-3 + 5e-4 * (tiles - 1) + 1e-6 * requests * (1 + max(length, 0))

    samples = [sample(n, length, seconds(n, length)) for n, length in cells for _ in range(3)]
    flat, stairs = fit(samples, [], 7), fit(samples, [], 7, tile=16)
    for table, share in ((flat, 0.25), (stairs, 0.8)):
        s16, s17, s20 = (table.times(Work(4, rows)).verify for rows in (16, 17, 20))
        assert (s17 - s16) / (s20 - s16) == pytest.approx(share, abs=0.05)


def test_a_length_that_was_seen_with_much_context_alone_is_no_matter() -> None:
    """Time was up before few tokens of context came to it."""
    cells = [(1, -1, 24), (1, 1, 24), (1, 7, 24), (1, -1, 900), (1, 1, 900), (1, 2, 900), (1, 7, 900)]
    seconds = {cell: 1e-3 + 1e-6 * cell[2] for cell in cells}
    table = fit([sample(*cell[:2], seconds[cell], cell[2]) for cell in cells for _ in range(3)], [], 7)
    assert table.context_s == pytest.approx(1e-6, rel=0.05)


def test_noise_makes_no_stairs() -> None:
    """Some numbers of rows have four shapes and their neighbours one, and each number of requests is measured in a mood
    of its own: that is no reason for a step between them."""
    steps: list[float] = []
    besides: list[float] = []
    for seed in range(30):
        generator = random.Random(seed)
        mood = {n: 1 + generator.uniform(0, 0.1) for n in (1, 2, 4, 8)}

        def seconds(requests: int, length: int, mood: dict[int, float], chance: random.Random) -> float:
            rows = requests * (1 + max(length, 0))
            usual = 8e-4 + 2e-5 * rows + 4e-5 * (requests - 1) + (2e-4 if length > 0 else 0.0)
            return usual * mood[requests] * (1 + abs(chance.gauss(0, 0.03)))

        cells = [(n, length) for n in (1, 2, 4, 8) for length in (-1, *range(1, 8))]
        table = fit([sample(*cell, seconds(*cell, mood, generator)) for cell in cells for _ in range(6)], [], 7)
        besides.append(table.drafted_s)
        times = [table.times(Work(4, rows)).verify for rows in range(4, 26, 2)]
        steps += [(after - before) / 4e-5 for before, after in pairwise(times)]
    assert sum(0.5 < step < 1.6 for step in steps) > 0.85 * len(steps)
    assert np.median(besides) == pytest.approx(2e-4, rel=0.1)


def test_few_requests_are_measured_most(
    target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting once, then each as long as the others: rounds of few requests are short."""
    engine = load(target_dir, drafter_dir(), policy="auto", max_running=4)
    clock, visits = [0.0], Counter[int]()

    def visit(_: Engine, __: object, requests: int, context: int, *___: object) -> list[Sample]:
        clock[0] += 1e-3 * requests
        visits[requests] += context == measuring.SHORT
        return [sample(requests, -1, 1e-3)]

    monkeypatch.setattr(measuring, "_visit", visit)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    measure(engine, 0.05)
    assert visits[1] > 1.5 * visits[2] > 2.25 * visits[4] > 2.25
    clock[0], visits = 0.0, Counter()
    measure(engine, 0.0)
    assert set(visits) == {1}, "no time at all: one request is measured in any case"


def test_prompts_teach_nothing_of_rows() -> None:
    """Rounds with prompts take twice what the table says; those without what it says, and go on doing so."""
    live, plain, prompt = LiveCost(TABLE, 512), Work(4, 4), Work(3, 3, prefill=10)
    for _ in range(300):
        live.observe(plain, TABLE.times(plain))
        live.observe(prompt, Times(verify=2 * TABLE.times(prompt).verify))
    assert live.times(prompt).verify == pytest.approx(2 * TABLE.times(prompt).verify, rel=0.05)
    for rows in (4, 8, 16):
        assert live.times(Work(4, rows)).verify == pytest.approx(TABLE.times(Work(4, rows)).verify, rel=0.02)


def test_sizes_that_are_not_seen_follow_those_that_are() -> None:
    """Where plain rounds take a fifth less than the table says, more rows do not come to look dear beside them."""
    live, plain = LiveCost(TABLE, 512), Work(4, 4)
    for _ in range(4000):
        live.observe(plain, Times(verify=0.8 * TABLE.times(plain).verify))
    live.refresh()
    for rows in (4, 8, 16, 64):
        assert live.times(Work(4, rows)).verify == pytest.approx(0.8 * TABLE.times(Work(4, rows)).verify, rel=0.05)
