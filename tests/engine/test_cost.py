"""The cost table: its arithmetic, what it is kept in, and what noisy rounds do to it."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.schedule import store
from engine.schedule.cost import CostTable, LiveCost, Times, Work, increasing, interpolate, nominal
from engine.schedule.fit import knots_through

TABLE = CostTable(
    verify=((1.0, 1e-3), (8.0, 2e-3), (64.0, 9e-3)),
    request_s=1e-5,
    context_s=1e-6,
    row_context_s=1e-7,
    prefill_row=0.5,
    draft=((1.0, 5e-4), (64.0, 8e-3)),
    draft_context_s=2e-7,
    absorb=((1.0, 1e-4), (64.0, 5e-4)),
)
KEY = {"model": "m", "threads": 2}


def test_seconds_add_up() -> None:
    work = Work(requests=2, rows=8, context=100, row_context=600, prefill=0, drafting=1, draft_context=50, absorbed=1)
    times = TABLE.times(work)
    assert times.verify == pytest.approx(2e-3 + 2e-5 + 1e-4 + 6e-5)
    assert times.draft == pytest.approx(5e-4 + 1e-5)
    assert times.absorb == pytest.approx(1e-4)
    assert TABLE.seconds(work) == pytest.approx(times.total)
    assert TABLE.times(replace(work, rows=6, prefill=4)).verify == times.verify, "a prompt row counts half"


def test_a_round_without_drafts_pays_for_none() -> None:
    times = TABLE.times(Work(requests=3, rows=3))
    assert times.draft == times.absorb == 0


def test_knots_are_joined_by_lines_and_go_on_beyond_the_last() -> None:
    knots = ((1.0, 1.0), (3.0, 2.0), (5.0, 2.0), (6.0, 4.0))
    assert [interpolate(knots, x) for x in (0, 1, 2, 4, 5.5, 7)] == [1, 1, 1.5, 2, 3, 6]


@pytest.mark.parametrize("seed", range(20))
def test_noisy_points_become_increasing_knots(seed: int) -> None:
    generator = random.Random(seed)
    points = [(float(generator.randrange(1, 20)), generator.random()) for _ in range(40)]
    knots = increasing(points)
    assert [x for x, _ in knots] == sorted({x for x, _ in points})
    assert all(a[1] <= b[1] for a, b in pairwise(knots))
    assert sum(y for _, y in points) / 40 == pytest.approx(sum(y for _, y in knots) / len(knots), abs=0.25)
    assert increasing(knots) == knots


def test_stairs_stay_where_they_stand_out_of_the_noise() -> None:
    stairs = [(float(x), 1.0 + (x > 8) + (x > 16)) for x in range(1, 25)]
    assert dict(knots_through(stairs, noise=0.02)) == dict(stairs)
    flat = dict(knots_through(stairs, noise=0.6))
    steps = [flat[x + 1.0] - flat[float(x)] for x in range(1, 24)]
    assert max(steps) == pytest.approx(min(steps)), "lost in the noise, they are a line"


@pytest.mark.parametrize("change", [
    {"verify": ()}, {"verify": ((1.0, 2.0), (1.0, 3.0))}, {"verify": ((1.0, 2.0), (2.0, 1.0))},
    {"verify": ((1.0, float("nan")),)}, {"verify": ((1.0, 0.0),)}, {"context_s": -1.0}, {"request_s": float("inf")},
])  # fmt: skip
def test_impossible_tables_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cost table"):
        replace(TABLE, **change)  # type: ignore[arg-type]


def observe(live: LiveCost, truth: CostTable, rounds: int, generator: random.Random, stalls: float = 0.0) -> None:
    for _ in range(rounds):
        running = generator.choice([1, 2, 4, 8])
        work = Work(running, running * generator.choice([1, 4]), 64 * running, 0, 0, running, 64 * running, running)
        times = truth.times(work)
        factor = generator.uniform(0.95, 1.05) * (20 if generator.random() < stalls else 1)
        live.observe(work, Times(times.draft * factor, times.verify * factor, times.absorb * factor))


def test_rounds_correct_a_table_that_is_off() -> None:
    """Every stage twice as slow as it was thought, drafting thrice: found within a few hundred rounds."""
    truth = replace(
        TABLE,
        verify=tuple((x, 2 * y) for x, y in TABLE.verify),
        request_s=2e-5,
        context_s=2e-6,
        draft=tuple((x, 3 * y) for x, y in TABLE.draft),
        absorb=tuple((x, 2 * y) for x, y in TABLE.absorb),
    )
    live = LiveCost(TABLE, 256)
    observe(live, truth, 400, random.Random(1))
    for running in (1, 2, 8):
        work = Work(running, 4 * running, 64 * running, 0, 0, running, 64 * running, running)
        assert live.times(work).total == pytest.approx(truth.times(work).total, rel=0.1)
    assert live.draft_s(4, 256) == pytest.approx(truth.times(Work(drafting=4, draft_context=256)).draft, rel=0.1)


def test_stalls_barely_move_it() -> None:
    """One round in twenty takes twenty times as long; the table was right."""
    live = LiveCost(TABLE, 256)
    observe(live, TABLE, 600, random.Random(2), stalls=0.05)
    work = Work(4, 16, 256, 0, 0, 4, 256, 4)
    assert live.times(work).total == pytest.approx(TABLE.seconds(work), rel=0.12)


def test_the_corrected_curve_never_falls() -> None:
    live = LiveCost(TABLE, 256)
    generator = random.Random(3)
    for _ in range(300):
        rows = generator.randrange(1, 256)
        live.observe(Work(1, rows), Times(verify=generator.uniform(1e-4, 1e-1)))
    assert all(a <= b for a, b in pairwise(live.curve))


def test_a_table_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    store.save(tmp_path / "new", KEY, TABLE)
    assert store.load(tmp_path / "new", KEY) == TABLE
    assert store.load(tmp_path / "new", {**KEY, "threads": 1}) is None, "another machine's table is not ours"
    assert not list((tmp_path / "new").glob("*.part"))


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "\x00\xff",
    lambda text: text.replace("0.001", "-1"), lambda text: text.replace('"threads": 2', '"threads": 3'),
    lambda text: json.dumps({"key": KEY, "table": {}}),
])  # fmt: skip
def test_a_damaged_file_is_measured_again(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    store.save(tmp_path, KEY, TABLE)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert store.load(tmp_path, KEY) is None
    assert "measuring again" in caplog.text and str(path) in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    store.save(tmp_path / "file", KEY, TABLE)
    assert "measured at every start" in caplog.text


def test_where_tables_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder(EngineConfig(model="m")) == tmp_path / "dspark-serve" / "cost"
    assert store.cache_folder(EngineConfig(model="m", cost_cache="")) is None
    assert store.cache_folder(EngineConfig(model="m", cost_cache="/x")) == Path("/x")


def test_tables_survive_json() -> None:
    assert store.decode(json.loads(json.dumps(asdict(TABLE)))) == TABLE
    assert store.decode(json.loads(json.dumps(asdict(nominal(7, 512))))) == nominal(7, 512)


def test_rare_slow_rounds_of_few_rows_make_no_others_look_slow() -> None:
    """A load begins with one request and cold caches: that says nothing of the eight that follow."""
    live, generator = LiveCost(TABLE, 512), random.Random(4)
    for number in range(6_000):
        rows = 1 if number % 150 == 0 else 8
        work = Work(requests=rows, rows=rows)
        slow = 5.0 if rows == 1 else 1.0 + 0.1 * generator.gauss(0, 1)
        live.observe(work, Times(verify=TABLE.times(work).verify * slow))
    assert live.times(Work(8, 8)).verify == pytest.approx(TABLE.times(Work(8, 8)).verify, rel=0.1)


def test_what_is_hardly_seen_does_not_outweigh_what_is() -> None:
    """Four rows seem to take longer than eight, by a few rounds that began a load: eight are what they are."""
    live = LiveCost(TABLE, 512)
    for number in range(4_000):
        few = number % 40 == 0
        work = Work(4, 4) if few else Work(8, 8)
        live.observe(work, Times(verify=(3.0 if few else 0.7) * TABLE.times(work).verify))
    assert live.times(Work(8, 8)).verify == pytest.approx(0.7 * TABLE.times(Work(8, 8)).verify, rel=0.1)
    assert all(a <= b for a, b in pairwise(live.curve))


def test_a_check_counts_at_once() -> None:
    """Rounds of 32 rows take 1.6 times what the table says, those of 8, which are not run meanwhile, what it says."""
    live, generator = LiveCost(TABLE, 512), random.Random(5)
    many, few = Work(8, 32), Work(8, 8)
    truth = TABLE.times(few).verify
    for _ in range(500):
        live.observe(many, Times(verify=1.6 * TABLE.times(many).verify * (1 + 0.05 * generator.gauss(0, 1))))
    assert live.times(few).verify > 1.2 * truth
    for _ in range(4):
        for _ in range(8):
            live.observe(many, Times(verify=1.6 * TABLE.times(many).verify))
        live.observe(few, Times(verify=truth), check=True)
    live.refresh()
    assert live.times(few).verify == pytest.approx(truth, rel=0.1)
    assert live.times(many).verify == pytest.approx(1.6 * TABLE.times(many).verify, rel=0.1)


def test_two_passes_of_absorbing_are_not_taken_for_a_dear_one() -> None:
    """What had waited is absorbed in a pass of its own; both take what the table says, so that nothing changes."""
    table = replace(TABLE, absorb=((1.0, 1e-4), (256.0, 6e-4)))
    live, work = LiveCost(table, 256), Work(1, 3, 64, 0, 0, 1, 64, 3, caught_up=20)
    times = table.times(work)
    assert times.absorb == pytest.approx(table.absorb_s(3) + table.absorb_s(20))
    for _ in range(300):
        live.observe(work, times)
    assert live.absorb_s(200) == pytest.approx(table.absorb_s(200), rel=1e-3)
    assert live.times(work).absorb == pytest.approx(times.absorb, rel=1e-3)


def test_what_a_drafter_takes_after_it_stood_still_is_not_believed() -> None:
    """Its weights are not in the caches then; while it goes on drafting they are."""
    plain, drafted = Work(2, 2), Work(2, 8, 0, 0, 0, 2, 128, 4)
    usual = TABLE.times(drafted)
    cold = Times(1.8 * usual.draft, 1.2 * usual.verify, 1.8 * usual.absorb)
    live = LiveCost(TABLE, 256)
    for _ in range(300):
        live.observe(plain, TABLE.times(plain))
        live.observe(drafted, cold)
    assert live.times(drafted).total == pytest.approx(usual.total, rel=0.02)
    for _ in range(300):
        live.observe(drafted, cold)
    assert live.times(drafted).draft == pytest.approx(cold.draft, rel=0.05)


def test_nor_is_what_the_next_one_takes_unless_it_is_less() -> None:
    """Looks at newcomers are short: two blocks, the second of which still comes cold."""
    plain, drafted = Work(2, 2), Work(2, 8, 0, 0, 0, 2, 128, 4)
    usual = TABLE.times(drafted)
    live = LiveCost(TABLE, 256)
    for _ in range(200):
        for work, share in ((plain, 1.0), (plain, 1.0), (drafted, 1.8), (drafted, 1.3)):
            times = TABLE.times(work)
            live.observe(work, Times(share * times.draft, times.verify, times.absorb))
    assert live.times(drafted).draft == pytest.approx(usual.draft, rel=0.02)
    for _ in range(200):
        live.observe(plain, TABLE.times(plain))
        live.observe(drafted, replace(usual, draft=0.5 * usual.draft))
    assert live.times(drafted).draft < 0.6 * usual.draft


def test_a_change_of_mood_leaves_the_shape_alone() -> None:
    """The machine takes a fifth longer for everything: a size that is not run meanwhile is dearer by as much."""
    live, run, other = LiveCost(TABLE, 512), Work(4, 16), Work(4, 4)
    for _ in range(300):
        live.observe(run, Times(verify=1.2 * TABLE.times(run).verify))
    assert live.times(run).verify == pytest.approx(1.2 * TABLE.times(run).verify, rel=0.01)
    assert live.times(other).verify == pytest.approx(1.2 * TABLE.times(other).verify, rel=0.03)


def test_while_nobody_drafts_it_comes_to_be_believed_as_dear_as_the_table_has_it() -> None:
    """At the speed of now: the machine is half as fast as when the table was measured."""
    plain, drafted = Work(2, 2), Work(2, 8, 0, 0, 0, 2, 128, 4)
    slow, usual = TABLE.times(plain), TABLE.times(drafted)
    live = LiveCost(TABLE, 256)
    for _ in range(300):
        live.observe(drafted, Times(5 * usual.draft, 2 * usual.verify, 5 * usual.absorb))
    assert live.times(drafted).draft > 4.5 * usual.draft
    for _ in range(5000):
        live.observe(plain, Times(verify=2 * slow.verify))
    assert live.times(drafted).draft == pytest.approx(2 * usual.draft, rel=0.1)
