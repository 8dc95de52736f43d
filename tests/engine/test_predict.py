"""A measured sweep foretold: by the tables as they were measured, and as servers had corrected them by then."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.errors import LoadError
from engine.schedule.acceptance import Acceptance
from engine.schedule.loads import Arrival
from engine.schedule.predict import predict, read, stretch, table
from engine.schedule.replay import traces
from engine.schedule.simulate import Simulator
from tests.engine.test_simulate import SMALL

SLOWER = 1.4
REQUESTS = [(40, 60), (90, 120)]
ARMS = {"plain": ("none", "plain", None), "fixed-3": ("dspark", "fixed", 3), "fixed-5": ("dspark", "fixed", None)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a machine leaves that has become slower than its tables say."""
    folder, easy = tmp_path_factory.mktemp("sweep"), Acceptance((0.8,) * 5)
    points, factors, blocks = [], [], []
    for name, (_, policy, tokens) in ARMS.items():
        load = [Arrival(0.0, *REQUESTS[number % 2]) for number in range(120)]
        slow = Simulator(SMALL.scaled(SLOWER), (easy,), policy, tokens, max_running=4, believed=SMALL)
        outcome = slow.run(load, 2000)
        budget = outcome.verified / outcome.rounds
        measured = {"tokens_per_s": outcome.steady_tokens_per_s, "mean_verify_budget": budget}
        points.append({"arm": name, "concurrency": 4, "mean_accepted_length": outcome.mean_accepted_length, **measured})
        records = [record.as_dict() for record in outcome.records]
        factors.append(stretch(records, SMALL, 5))
        blocks += traces(records) if name == "fixed-5" else []
    assert factors == pytest.approx([SLOWER] * 3, rel=0.03)
    content = {
        "requests": REQUESTS,
        "arms": {n: {"draft": d, "policy": p, "draft_tokens": t} for n, (d, p, t) in ARMS.items()},
        "tables": {"none": asdict(SMALL), "dspark": asdict(SMALL)},
        "traces": {"dspark": [[[b.survival, b.accepted] for b in trace.blocks] for trace in blocks]},
        "between_s": {"4": 0.0},
        "cores": 2,
        "stretches": {"4": factors[0]},
    }
    (folder / "points.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (folder / "profiles.json").write_text(json.dumps(content))
    return folder


def test_a_machine_that_became_slower_is_foretold_by_the_tables_as_corrected(sweep: Path) -> None:
    lines = list(predict(read(sweep / "points.jsonl", sweep / "profiles.json")))
    assert [line["arm"] for line in lines] == list(ARMS)
    for line in lines:
        assert line["ratio"] == pytest.approx(SLOWER, rel=0.08), "the tables alone know nothing of it"
        assert line["ratio_as_corrected"] == pytest.approx(1.0, abs=0.08)
        assert line["predicted_accepted_length"] == pytest.approx(line["measured_accepted_length"], rel=0.08)
    assert table(lines).endswith("0 of 3 within 15%; 3 of 3 within 15% by the tables as corrected by then")


def test_a_sweep_that_noted_no_corrections_is_foretold_by_its_tables(sweep: Path, tmp_path: Path) -> None:
    content = json.loads((sweep / "profiles.json").read_text())
    del content["stretches"]
    (tmp_path / "profiles.json").write_text(json.dumps(content))
    lines = list(predict(read(sweep / "points.jsonl", tmp_path / "profiles.json")))
    assert all("ratio_as_corrected" not in line for line in lines) and table(lines).endswith("0 of 3 within 15%")


def test_damaged_profiles_are_named(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "profiles.json").write_text('{"requests": [[1, 2]]}')
    with pytest.raises(LoadError, match=r"profiles\.json holds no profiles of `make bench-load`"):
        read(sweep / "points.jsonl", tmp_path / "profiles.json")
