"""The host's side: it launches before it reads, and gives pages back when nothing under way can write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.config import EngineConfig
from engine.device_rounds.round import Size
from engine.device_rounds.rounds import DeviceRounds
from engine.engine import Engine
from engine.loading import load_engine
from engine.schedule.record import Sitting, Stop
from engine.types import FinishReason, Phase
from tests.engine.device_rounds.helpers import load, rounds_of
from tests.engine.gemma import make_gemma
from tests.engine.helpers import GREEDY, PAGE_BYTES, Result, collect, coupled, rejection, request, run, text
from tests.engine.lookahead import save_eagle3

Drafters = Callable[..., Path]


@pytest.fixture
def pair(target_dir: Path, drafter_dir: Drafters) -> tuple[Engine, DeviceRounds]:
    engine = load(target_dir, drafter_dir(), policy="relayed", kv_memory=40 * PAGE_BYTES)
    return engine, rounds_of(engine)


def steps(engine: Engine, count: int) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for _ in range(count):
        collect(results, engine.step())
        engine.check()
    return results


def test_a_round_is_read_after_the_next_was_launched(
    pair: tuple[Engine, DeviceRounds], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rounds = pair
    order: list[str] = []
    graphs, read = rounds.graphs, rounds.staging.read

    def launch(size: Size) -> None:
        order.append(f"launch {rounds.seating.launched}")
        graphs(size)

    def late(turn: int) -> Any:
        order.append(f"read {rounds.seating.read}")
        return read(turn)

    monkeypatch.setattr(rounds, "graphs", launch)
    monkeypatch.setattr(rounds.staging, "read", late)
    found = run(engine, [request("a", [1, 2, 3], 6)])["a"]
    assert order[:5] == ["launch 0", "launch 1", "read 0", "launch 2", "read 1"]
    assert len(found.tokens) == 6 and sum(bool(delta.tokens) for delta in found.deltas) <= 6


def test_pages_of_who_ends_are_given_back_once_what_is_under_way_was_read(
    pair: tuple[Engine, DeviceRounds],
) -> None:
    engine, rounds = pair
    engine.submit(request("a", range(40), 60, coupled(1)))
    engine.submit(request("b", range(30), 60, coupled(2)))
    steps(engine, 5)
    assert rounds.flying and len(rounds.seating.seats) == 2
    pages = next(s.pages for s in engine.running if s.request.request_id == "a")
    free = engine.pool.available
    engine.cancel("a")
    engine.check()
    assert rounds.held == [pages] and engine.pool.available == free
    steps(engine, 1)
    assert rounds.held == [] and engine.pool.available >= free + len(pages) - 2
    engine.cancel("b")
    assert engine.has_work and not engine.running
    steps(engine, 1)
    assert not engine.has_work and engine.pool.available == engine.pool.total


def test_a_stop_id_ends_one_round_late_and_nothing_after_it_is_heard(pair: tuple[Engine, DeviceRounds]) -> None:
    engine, rounds = pair
    whole = text(engine, request("a", [7, 8], 30, coupled(5)))
    stop = whole[12]
    expected = whole[: whole.index(stop) + 1]
    found = run(engine, [request("b", [7, 8], 30, coupled(5), stop_ids=[stop])])["b"]
    assert found.tokens == expected and found.finish is FinishReason.STOP_ID
    assert rounds.seating.launched == rounds.seating.read


def test_pages_cover_the_most_that_two_rounds_may_add(pair: tuple[Engine, DeviceRounds]) -> None:
    engine, rounds = pair
    engine.submit(request("a", range(10), 100, coupled(1)))
    for _ in range(20):
        steps(engine, 1)
        for sequence in rounds.seating.seats:
            assert len(sequence.pages) * 16 >= sequence.kv_length + 6  # the round under way
            length = int(rounds.state.whole[2, rounds.seating.seats[sequence]])
            assert sequence.kv_length < length <= sequence.kv_length + 6


def test_no_sequence_ever_holds_the_scratch_page(pair: tuple[Engine, DeviceRounds]) -> None:
    engine, rounds = pair
    for i in range(12):
        engine.submit(request(str(i), range(i + 1), 50, coupled(i)))
    scratch = rounds.state.scratch_page
    assert scratch == engine.pool.total
    while engine.has_work:
        steps(engine, 1)
        assert not any(scratch in sequence.pages for sequence in engine.running)
        assert all(cache.pages == scratch + 1 for cache in engine.target.caches)


def test_a_newcomer_takes_the_lowest_free_seat_and_who_sits_far_out_moves(pair: tuple[Engine, DeviceRounds]) -> None:
    engine, rounds = pair
    for i in range(9):
        engine.submit(request(str(i), [i], 90 if i in (0, 8) else 20, GREEDY))
    results = steps(engine, 4)
    assert sorted(rounds.seating.seats.values()) == list(range(9))
    while len(engine.running) > 2:
        collect(results, engine.step())
        engine.check()
    steps(engine, 2)
    assert sorted(rounds.seating.seats.values()) == [0, 1]
    run(engine, [])


def test_pages_that_run_out_send_the_last_in_line_back(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed", kv_memory=9 * PAGE_BYTES, max_model_len=128)
    todo = [request(str(i), [i, i], 60, coupled(i)) for i in range(4)]
    found = run(engine, todo)
    alone = load(target_dir, max_model_len=128)
    assert {n: r.tokens for n, r in found.items()} == {n: r.tokens for n, r in run(alone, todo).items()}
    assert rounds_of(engine).seating.launched > 10


def test_prompts_run_between_rounds_and_who_cannot_enter_stops_nobody(
    target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed", max_running=2, prefill_chunk=4)
    rounds = rounds_of(engine)
    todo = [request(str(i), range(i, 3 * i + 3), 20 + 5 * i, coupled(i)) for i in range(5)]
    expected = {name: result.tokens for name, result in run(load(target_dir), todo).items()}
    for one in todo:
        engine.submit(one)
    results = steps(engine, 6)
    assert rounds.flying and len(engine.waiting) == 3
    launched = rounds.seating.launched
    monkeypatch.setattr(rounds, "drain", lambda: pytest.fail("nothing makes anybody stand up"))
    while len(engine.running) == 2:
        collect(results, engine.step())
        engine.check()
        launched += 1
        assert rounds.seating.launched == launched
    monkeypatch.undo()
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
    assert {name: result.tokens for name, result in results.items()} == expected
    prompts = [record for record in engine.history.last() if record.prefill_rows and not record.requests]
    assert sum(record.prefill_rows for record in prompts) >= 10


def test_a_prompt_for_which_pages_are_short_takes_the_ordinary_path(target_dir: Path, drafter_dir: Drafters) -> None:
    """Nobody is preempted while rounds are under way."""
    engine = load(target_dir, drafter_dir(), policy="fixed", kv_memory=8 * PAGE_BYTES, max_model_len=120)
    todo = [request("a", range(30), 60, coupled(1)), request("b", range(40), 20, coupled(2))]
    todo += [request(f"high {i}", range(i, 20 + i), 30, coupled(i), priority=1) for i in range(3)]
    engine.submit(todo[0])
    results = steps(engine, 4)
    for one in todo[1:]:
        engine.submit(one)
        collect(results, engine.step())
        engine.check()
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
    alone = run(load(target_dir, max_model_len=120, prefix_cache=False), todo)
    assert {n: r.tokens for n, r in results.items()} == {n: r.tokens for n, r in alone.items()}


def test_more_requests_than_seats_are_served_by_the_host(
    target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.device_rounds.rounds.SEATS", 3)
    engine = load(target_dir, drafter_dir(), policy="fixed", max_running=8)
    rounds = rounds_of(engine)
    todo = [request(str(i), [i, 3], 10 + 10 * i, coupled(i)) for i in range(6)]
    expected = {name: result.tokens for name, result in run(load(target_dir), todo).items()}
    for one in todo:
        engine.submit(one)
    results: dict[str, Result] = {}
    while engine.has_work:
        assert len(engine.running) <= 3 or not rounds.seating.seats
        collect(results, engine.step())
        engine.check()
    assert {name: result.tokens for name, result in results.items()} == expected
    assert 0 < rounds.seating.launched < engine.rounds


def test_every_round_has_its_decision_record(pair: tuple[Engine, DeviceRounds]) -> None:
    engine, _ = pair
    todo = [request(str(i), [i, 3], 40, coupled(i)) for i in range(5)]
    todo += [request("off", [4], 40, coupled(9), speculation=rejection())]
    results = run(engine, todo)
    records = engine.history.last()
    assert [record.round for record in records] == list(range(1, len(records) + 1))
    deltas = [delta for result in results.values() for delta in result.deltas if delta.decode_round]
    for name in ("drafted", "verified", "accepted"):
        told = sum(getattr(one, name) for record in records for one in record.requests)
        heard = sum(getattr(delta, name) for delta in deltas)
        assert told >= heard and told - heard <= 5 * len(todo), "tokens behind an end are all that is not told"
    drafted = [record for record in records if record.candidates]
    assert any(record.stop is Stop.BUDGET for record in drafted)
    assert all(record.measured_s > 0 and record.predicted_s > 0 for record in records)
    sittings = {one.sitting for record in drafted for one in record.requests}
    assert {Sitting.DRAFTS, Sitting.ASKED} <= sittings
    assert engine.scheduler.planner.reliability.verified.sum() > 0
    for one in drafted[-1].requests:
        assert list(one.survival) == sorted(one.survival, reverse=True)


def test_a_round_that_fails_leaves_an_engine_that_works(
    pair: tuple[Engine, DeviceRounds], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rounds = pair
    expected = text(engine, request("a", [1, 2], 20, coupled(1)))
    engine.submit(request("b", [5, 6], 50, coupled(2)))
    steps(engine, 4)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "graphs", lambda size: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.reset()
    engine.check()
    assert not engine.has_work and engine.pool.available == engine.pool.total
    assert text(engine, request("c", [1, 2], 20, coupled(1))) == expected


def test_broken_logits_end_their_request_alone(pair: tuple[Engine, DeviceRounds]) -> None:
    engine, _ = pair
    expected = text(engine, request("a", [1, 2], 40, coupled(1)))
    engine.submit(request("a", [1, 2], 40, coupled(1)))
    engine.submit(request("b", [5, 6], 40, coupled(2)))
    results = steps(engine, 4)
    sick = next(s for s in engine.running if s.request.request_id == "b")
    for cache in engine.target.caches:
        cache.k[sick.pages[0]] = torch.nan
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
    assert results["b"].finish is FinishReason.ERROR and sick.phase is Phase.FINISHED
    assert results["a"].tokens == expected
    assert engine.pool.available == engine.pool.total


def test_what_needs_the_host_inside_a_round_has_no_device_rounds(
    target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    """Drafters that go token by token; targets with windows; a configuration that forbids it, or a CPU."""
    save_eagle3(tmp_path / "eagle3", hf_target, block=4)
    make_gemma().save_pretrained(tmp_path / "gemma")
    for target, draft in ((target_dir, str(tmp_path / "eagle3")), (tmp_path / "gemma", "none")):
        config = EngineConfig(str(target), draft, kv_memory=2**22, max_model_len=64)
        assert load_engine(config, device_rounds=True).device_rounds is None
    config = EngineConfig(str(target_dir), kv_memory=2**22, max_model_len=64)
    assert load_engine(config).device_rounds is None, "on a CPU nobody waits for a device"
