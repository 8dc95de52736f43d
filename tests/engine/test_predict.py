"""A measured sweep foretold: as fast as its tables say that the machine is, and no slower one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.errors import LoadError
from engine.schedule.acceptance import Acceptance
from engine.schedule.cost import CostTable
from engine.schedule.loads import Arrival
from engine.schedule.predict import Sweep, predict, read, shared_s, table
from engine.schedule.replay import traces
from engine.schedule.simulate import Simulator
from tests.engine.test_simulate import SMALL

REQUESTS = [(40, 60), (90, 120)]
ARMS = {"plain": ("none", "plain", None), "fixed-3": ("dspark", "fixed", 3), "fixed-5": ("dspark", "fixed", None)}


def leave(folder: Path, slower: float) -> Sweep:
    """What a sweep leaves on a machine so many times as slow as its tables say."""
    truth = CostTable(
        verify=tuple((rows, slower * seconds) for rows, seconds in SMALL.verify),
        request_s=slower * SMALL.request_s,
        draft=tuple((blocks, slower * seconds) for blocks, seconds in SMALL.draft),
        absorb=tuple((rows, slower * seconds) for rows, seconds in SMALL.absorb),
    )
    points, blocks = [], []
    for name, (_, policy, tokens) in ARMS.items():
        load = [Arrival(0.0, *REQUESTS[number % 2]) for number in range(120)]
        outcome = Simulator(truth, (Acceptance((0.8,) * 5),), policy, tokens, max_running=4).run(load, 2000)
        budget = outcome.verified / outcome.rounds
        measured = {"tokens_per_s": outcome.steady_tokens_per_s, "mean_verify_budget": budget}
        points.append({"arm": name, "concurrency": 4, "mean_accepted_length": outcome.mean_accepted_length, **measured})
        blocks += traces([record.as_dict() for record in outcome.records]) if name == "fixed-5" else []
    content = {
        "requests": REQUESTS,
        "arms": {n: {"draft": d, "policy": p, "draft_tokens": t} for n, (d, p, t) in ARMS.items()},
        "tables": {"none": asdict(SMALL), "dspark": asdict(SMALL)},
        "traces": {"dspark": [[[b.survival, b.accepted] for b in trace.blocks] for trace in blocks]},
        "between_s": {"4": 0.0},
        "cores": 2,
    }
    (folder / "points.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (folder / "profiles.json").write_text(json.dumps(content))
    return read(folder / "points.jsonl", folder / "profiles.json")


@pytest.mark.parametrize("slower", [1.0, 1.4])
def test_a_sweep_is_foretold_from_its_tables(tmp_path: Path, slower: float) -> None:
    lines = list(predict(leave(tmp_path, slower)))
    assert [line["arm"] for line in lines] == list(ARMS)
    for line in lines:
        assert line["ratio"] == pytest.approx(slower, rel=0.08), "the tables know nothing of a machine that is slower"
        assert line["predicted_accepted_length"] == pytest.approx(line["measured_accepted_length"], rel=0.08)
    assert table(lines).endswith(f"{3 if slower == 1.0 else 0} of 3 within 15%")


def test_damaged_profiles_are_named(tmp_path: Path) -> None:
    leave(tmp_path, 1.0)
    (tmp_path / "profiles.json").write_text('{"requests": [[1, 2]]}')
    with pytest.raises(LoadError, match=r"profiles\.json holds no profiles of `make bench-load`"):
        read(tmp_path / "points.jsonl", tmp_path / "profiles.json")


@pytest.mark.parametrize(
    ("front", "engine", "cores", "lost"),
    [
        (0.0, 1.9, 2, 0.0),
        (0.4, 1.6, 2, 0.4),  # the engine wants both: it stands still while one is gone
        (0.4, 0.8, 2, 0.0),  # the engine runs on one: there is room beside it
        (0.5, 0.5, 1, 0.5),
        (0.4, 1.2, 2, 0.2),
        (1.0, 1.0, 8, 0.02),  # 8/7 cores, by what it uses of the seven that are left
    ],
)
def test_the_engine_stands_still_while_a_core_is_gone_that_it_wants(
    front: float, engine: float, cores: int, lost: float
) -> None:
    point = {"front_cores": front * 0.75, "client_cores": front * 0.25, "engine_cores": engine, "tokens_per_s": 100.0}
    assert shared_s(point, cores) * 100 == pytest.approx(lost, abs=0.005)
