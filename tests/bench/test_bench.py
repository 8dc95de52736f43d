"""Benchmarks run seldom: at least each of them can be started, and knows its flags."""

from __future__ import annotations

import argparse
import asyncio
import json
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

import tests.bench
from tests.bench import load, load_pooled
from tests.bench.decoding import beside_plain, cost_by_rows
from tests.bench.load_client import TOKENS, Load, Pace, Segment, mixed_jobs
from tests.bench.load_pooled import beside_best, pooled
from tests.bench.load_report import AUTO
from tests.bench.measure import EMBEDDED, Subject, add_subject, subject_of
from tests.bench.turns import parser, ratio

NAMES = [name for _, name, _ in pkgutil.walk_packages(tests.bench.__path__, "tests.bench.") if ".runners" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_imports(name: str) -> None:
    import_module(name)


def test_turns_are_compared_in_pairs() -> None:
    """A machine that is twice as fast at times is no difference between the arms."""
    moods = [1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.5] * 4
    own, low, high = ratio([97 * mood for mood in moods], [100 * mood for mood in moods])
    assert own == pytest.approx(0.97) and low == pytest.approx(0.97) and high == pytest.approx(0.97)
    own, low, high = ratio([100, 90, 110, 100], [100, 100, 100, 100])
    assert own == pytest.approx(1.0) and low < 0.97 and high > 1.03


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "plain,nonsense"], "'nonsense' is not one of plain, fixed"),
        (["--arms", "plain,fixed-8"], "'fixed-8' is not one of plain, fixed"),
        (["--concurrency", "1,x"], "'1,x' is no list of numbers of at least 1"),
        (["--concurrency", "0"], "'0' is no list of numbers of at least 1"),
        (["--seconds", "0.1"], "'0.1' is no time of at least a turn"),
        (["--seconds", "nan"], "'nan' is no time of at least a turn"),
    ],
)
def test_turns_say_what_is_wrong_with_a_flag(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(flags)
    assert said in capsys.readouterr().err


def test_fixed_lengths_take_turns_too() -> None:
    assert parser().parse_args(["--arms", "plain,fixed-3,auto"]).arms == ("plain", "fixed-3", "auto")


def test_mixed_jobs_are_all_prompts_once() -> None:
    jobs = mixed_jobs(EMBEDDED)
    by_domain = EMBEDDED.by_domain()
    assert sorted(job.prompt for job in jobs) == sorted(p for prompts in by_domain.values() for p in prompts)
    assert {job.tokens for job in jobs} == set(TOKENS)
    assert {domain for domain in by_domain if jobs[0].prompt in by_domain[domain]} != {
        domain for domain in by_domain if jobs[1].prompt in by_domain[domain]
    }


def test_a_drafter_is_found_by_itself_or_in_its_run(tmp_path: Path) -> None:
    assert EMBEDDED.drafter("dspark") == EMBEDDED.drafters / "dspark"
    run = tmp_path / "mtp" / "drafter"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert Subject(drafters=tmp_path).drafter("mtp") == run
    assert Subject(drafters=tmp_path).drafter("dspark") is None


@pytest.mark.parametrize("flag", ["--target", "--drafters", "--prompts"])
def test_what_is_not_there_is_named(flag: str, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_subject(parser)
    assert subject_of(parser.parse_args([])).drafter("dspark") is not None
    with pytest.raises(SystemExit, match=f"{flag}: .*missing"):
        subject_of(parser.parse_args([flag, str(tmp_path / "missing")]))


def test_a_domain_without_prompts_is_named() -> None:
    with pytest.raises(SystemExit, match=r"--domains: .* has none of 'poems'; it has code, prose, arithmetic"):
        beside_plain(1, 1, ["code", "poems"], EMBEDDED, [0.0])
    with pytest.raises(SystemExit, match="holds no dspark"):
        beside_plain(1, 1, ["code"], Subject(drafters=Path("nowhere")), [0.0])


def test_a_forward_is_measured_by_rows(capsys: pytest.CaptureFixture[str]) -> None:
    cost_by_rows(1, 1)
    measured = json.loads(capsys.readouterr().out)
    assert all(measured[f"ms_{rows}"] > 0 for rows in (1, 2, 3, 4, 6, 8))


class _Asleep:
    """A server that nobody runs."""

    address = "127.0.0.1:1"
    woken = 0

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.woken += 1
        yield


async def test_a_load_counts_the_time_that_its_server_ran() -> None:
    """What others do in between is neither its time nor its users'."""
    server = _Asleep()
    users = Load(server, [], 1, 1.0)  # type: ignore[arg-type]
    segments = Segment(), Segment()
    for segment in (segments[0], segments[1], segments[0]):
        with users.awake(segment):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
    with users.awake():
        pass
    assert server.woken == 4
    assert 0.04 <= segments[0].seconds < 0.2 and 0.02 <= segments[1].seconds < 0.2
    assert sum(s.seconds for s in segments) <= users.now() < 0.4


def test_a_request_has_a_speed_in_every_segment_that_it_runs_through() -> None:
    first, second = Segment(), Segment()
    pace = Pace()
    for at in range(21):
        pace.token(first, 2, now=0.1 * at)
    for at in range(31):
        pace.token(second, 1, now=10 + 0.1 * at)
    pace.close()
    assert first.user_rates == pytest.approx([20.0]) and second.user_rates == pytest.approx([10.0])
    pace = Pace()
    pace.token(first, 8, now=0.0)
    pace.token(first, 8, now=1.0)
    pace.close()
    assert len(first.user_rates) == 1, "too few tokens say nothing"


def test_sweeps_are_pooled_by_what_ran_together() -> None:
    """A sweep on a machine half as fast says the same, and the arm that does best is found over all of them."""

    def points(speed: float, arms: dict[str, list[float]]) -> list[dict[str, object]]:
        return [
            {"arm": arm, "concurrency": 4, "tokens_per_s_repeats": [speed * each for each in repeats]}
            for arm, repeats in arms.items()
        ]

    first = points(1.0, {AUTO: [99, 198, 97], "plain": [100, 200, 100], "mtp1": [101, 150, 80], "eagle3": [9, 9, 9]})
    second = points(0.5, {AUTO: [98, 99], "plain": [100, 100], "mtp1": [70, 70]})
    (repeats,) = pooled([first, second]).values()
    assert set(repeats) == {AUTO, "plain", "mtp1"}, "what only one of them has is no other arm of both"
    found = beside_best(repeats)
    assert found["best"] == "plain" and found["repeats"] == 5
    assert found["ratio"] == pytest.approx(0.99) and 0.97 <= found["interval"][0] <= found["interval"][1] <= 0.99
    with pytest.raises(ValueError, match="nothing to compare"):
        beside_best({"plain": [1.0]})
    with pytest.raises(ValueError, match="not as many repeats"):
        beside_best({"plain": [1.0], AUTO: [1.0, 2.0]})


@pytest.mark.parametrize("held", [None, "no json", '{"arm": "plain"}'])
def test_what_is_no_sweep_is_named(held: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.jsonl"
    if held is not None:
        path.write_text(held)
    with pytest.raises(SystemExit):
        load_pooled.main([str(path)])
    assert "points.jsonl holds no lines of `make bench-load`" in capsys.readouterr().err


def test_a_sweep_without_auto_cannot_be_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text(json.dumps({"arm": "plain", "concurrency": 4, "tokens_per_s_repeats": [1.0]}))
    with pytest.raises(SystemExit):
        load_pooled.main([str(path)])
    assert "at 4 at once: nothing to compare with dspark-auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seconds", "nan"], "'nan' is no time of at least a turn"),
        (["--seconds", "0"], "'0' is no time of at least a turn"),
        (["--repeats", "0"], "'0' is no number of at least 1"),
        (["--repeats", "x"], "'x' is no number of at least 1"),
    ],
)
def test_sweeps_say_what_is_wrong_with_a_flag(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.parser().parse_args(flags)
    assert said in capsys.readouterr().err
