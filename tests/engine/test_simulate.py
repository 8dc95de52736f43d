"""The planner in a world whose costs and acceptances are known: drafting where it pays, and never losing much."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine.schedule import following
from engine.schedule.__main__ import main
from engine.schedule.acceptance import Acceptance
from engine.schedule.cost import CostTable
from engine.schedule.loads import Arrival, closed_load
from engine.schedule.native_gate import CHECKS
from engine.schedule.record import Sitting, Stop
from engine.schedule.simulate import Outcome, Simulator

SMALL = CostTable(  # weights in the cache: every row costs
    verify=((1.0, 0.7e-3), (2.0, 0.8e-3), (8.0, 1.3e-3), (64.0, 6.5e-3), (512.0, 50e-3)),
    request_s=2e-6,
    draft=((1.0, 0.45e-3), (8.0, 1.8e-3), (64.0, 13e-3)),
    absorb=((1.0, 0.1e-3), (64.0, 0.5e-3), (512.0, 3e-3)),
)
LARGE = CostTable(  # weights read from memory: rows are nearly free
    verify=((1.0, 20e-3), (64.0, 21e-3), (512.0, 40e-3)),
    draft=((1.0, 2e-3), (64.0, 3e-3)),
    absorb=((1.0, 0.2e-3), (256.0, 1e-3)),
)
STAIRS = CostTable(  # two cores with AVX-512: rows come in tiles
    verify=(
        *((1.0, 0.43e-3), (4.0, 0.55e-3), (8.0, 0.89e-3), (12.0, 0.9e-3), (16.0, 1.21e-3), (20.0, 1.21e-3)),
        *((24.0, 1.7e-3), (64.0, 3e-3), (512.0, 11e-3)),
    ),
    request_s=1.4e-5,
    prefill_row=1.5,
    draft=((1.0, 0.25e-3), (8.0, 0.95e-3), (16.0, 1.46e-3), (64.0, 1.9e-3)),
    absorb=((1.0, 0.09e-3), (16.0, 0.24e-3), (64.0, 0.5e-3)),
)
HARD = Acceptance((0.55, 0.5, 0.45, 0.4, 0.4), bias=0.5)
EASY = Acceptance((0.9, 0.9, 0.88, 0.88, 0.85), spread=1.0)


def play(table: CostTable, profile: Acceptance, policy: str, running: int, **more: object) -> Outcome:
    keep = more.pop("keep", 0)
    simulator = Simulator(table, (profile,), policy, max_running=running, **more)  # type: ignore[arg-type]
    return simulator.run(closed_load(running, 2 * running + 4, 96), keep)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "profile", "running"), [(SMALL, HARD, 1), (SMALL, HARD, 8), (SMALL, EASY, 1), (LARGE, HARD, 8)]
)
def test_auto_is_never_much_slower_than_the_best_other_choice(
    table: CostTable, profile: Acceptance, running: int
) -> None:
    others = [play(table, profile, policy, running).tokens_per_s for policy in ("plain", "fixed", "causal")]
    others += [play(table, profile, "fixed", running, draft_tokens=n).tokens_per_s for n in (1, 3)]
    assert play(table, profile, "auto", running).tokens_per_s >= 0.95 * max(others)


@pytest.mark.parametrize("running", [8, 16])
def test_few_are_followed_where_drafting_does_not_pay(running: int) -> None:
    """Every fourth request would draft well alone, and rows up to the next stair look free: still none pays here."""
    kinds = (Acceptance((0.55, 0.5, 0.5, 0.5, 0.5), spread=1.0),) * 3 + (Acceptance((0.8,) + (0.75,) * 4, spread=1.0),)
    lengths = random.Random(0)
    load = [Arrival(0.0, 100, lengths.randrange(60, 160), number % 4) for number in range(200)]
    rates = [
        Simulator(STAIRS, kinds, policy, max_running=running, noise=0.1).run(load).steady_tokens_per_s
        for policy in ("plain", "auto")
    ]
    assert rates[1] >= 0.98 * rates[0]


def test_rounds_like_those_before_say_all_the_same_who_ran() -> None:
    """They are not learned from one by one; their records are whole."""
    hard = Acceptance((0.2,) * 5)
    outcome = Simulator(STAIRS, (hard,), "auto", max_running=3).run([Arrival(0.0, 10, 200)] * 3, 1000)
    decoding = [record for record in outcome.records if not record.prefill_rows]
    alike = [record for record in decoding if not record.candidates]
    assert len(alike) > 100 and all(len(record.requests) == record.running for record in decoding)
    contexts = [[request.context for request in record.requests] for record in alike[-20:]]
    assert all(later[0] == before[0] + 1 for before, later in itertools.pairwise(contexts))


def drafted(certainty: tuple[float, ...]) -> list[float]:
    """Shares of their rounds in which hard and easy requests draft: one at a time, every fourth worth drafting for."""
    kinds = (Acceptance((0.5, 0.4, 0.4, 0.4, 0.4), spread=3.0), Acceptance((0.75,) * 5, spread=3.0))
    load = [Arrival(0.0, 100, 100, int(number % 4 == 3)) for number in range(120)]
    simulator = Simulator(STAIRS, kinds, "auto", max_running=1, certainty=certainty, seed=2)
    rounds, counts = [1, 1], [0, 0]
    for record in simulator.run(load, 100_000).records[2000:]:
        for request in record.requests:
            kind = load[int(request.request_id)].acceptance
            rounds[kind] += 1
            counts[kind] += request.drafted > 0
    return [count / of for count, of in zip(counts, rounds, strict=True)]


def test_the_targets_certainty_says_who_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their blocks alone that shows late, where who does not draft is followed all the same."""
    hard, easy = drafted((0.4, 0.85))
    assert hard < 0.2 and easy > 0.9
    monkeypatch.setattr(following, "PATIENCE", 1 << 40)
    hard, easy = drafted((0.4, 0.85))
    assert hard < 0.2 and easy > 0.9
    assert easy > drafted(())[1] + 0.25


def test_who_does_not_draft_is_soon_not_followed_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the target's certainty, too, those worth drafting for then draft, and not many others."""
    hard, easy = drafted(())
    assert hard < 0.25 and easy > 0.8
    monkeypatch.setattr(following, "PATIENCE", 1 << 40)
    assert easy > drafted(())[1] + 0.2


def test_drafting_stops_where_it_does_not_pay_and_goes_on_where_it_does() -> None:
    loses, wins = play(SMALL, HARD, "auto", 8, keep=10_000), play(SMALL, EASY, "auto", 1)
    assert loses.drafted_rounds < 0.05 * loses.rounds
    assert wins.drafted_rounds > 0.5 * wins.rounds
    assert any(r.sitting is Sitting.PROBE for record in loses.records for r in record.requests)


def test_drafting_comes_back_when_it_pays_again() -> None:
    """Hard requests first, then easy ones: the probes of the second half find out."""
    simulator = Simulator(SMALL, (HARD, EASY), "auto", max_running=2)
    load = [Arrival(0.0, 64, 128, 0)] * 8 + [Arrival(0.0, 64, 128, 1)] * 20
    records = simulator.run(load, 100_000).records
    share = [
        sum(r.drafted > 0 for r in record.requests) / len(record.requests) for record in records if record.requests
    ]
    half = len(share) // 2
    assert sum(share[: half // 2]) / (half // 2) < 0.35
    assert sum(share[-half // 2 :]) / (half // 2) > 0.7


def test_a_wrong_table_and_stalls_are_survived() -> None:
    """The planner believes that drafting is ten times cheaper than it is, and one round in thirty stalls."""
    believed = replace(SMALL, draft=tuple((x, y / 10) for x, y in SMALL.draft))
    plain = play(SMALL, HARD, "plain", 8, noise=0.1).tokens_per_s
    auto = play(SMALL, HARD, "auto", 8, noise=0.1, believed=believed).tokens_per_s
    assert auto >= 0.9 * plain
    stalled = play(SMALL, EASY, "auto", 1, noise=0.1, stalls=0.03).tokens_per_s
    assert stalled >= 1.2 * play(SMALL, EASY, "plain", 1, noise=0.1, stalls=0.03).tokens_per_s


def test_a_round_without_drafts_believed_too_slow_is_found_out() -> None:
    """While everybody drafts no round shows what one without drafts takes; some must, or drafting never ends."""
    slow = tuple((x, 2 * y if x <= 8 else max(y, 2.6e-3)) for x, y in SMALL.verify)
    even = Acceptance((0.75, 0.75, 0.75, 0.75, 0.75))
    assert play(SMALL, even, "fixed", 8).tokens_per_s < 0.8 * (plain := play(SMALL, even, "plain", 8).tokens_per_s)
    simulator = Simulator(SMALL, (even,), "auto", max_running=8, believed=replace(SMALL, verify=slow))
    outcome = simulator.run(closed_load(8, 60, 96), 10_000)
    assert outcome.tokens_per_s >= 0.93 * plain
    sittings = [{r.sitting for r in record.requests} for record in outcome.records if record.requests]
    assert {Sitting.CHECK} in sittings, "all sit out together"
    runs = [len(list(those)) for check, those in itertools.groupby(sittings, {Sitting.CHECK}.__eq__) if check]
    assert not any(run % CHECKS for run in runs), "long enough for the last to be what such rounds usually are"


@pytest.mark.parametrize("policy", ["fixed", "threshold", "causal", "relayed", "auto"])
def test_records_say_what_happened(policy: str) -> None:
    outcome = play(LARGE, replace(EASY, bias=1.0), policy, 8, keep=10_000)
    for record in outcome.records:
        assert record.policy == policy
        assert record.verified == sum(r.verified for r in record.requests) <= record.candidates
        assert record.accepted == sum(r.accepted for r in record.requests) <= record.verified
        assert record.tokens == len(record.requests) + record.accepted
        assert record.predicted_s == pytest.approx(record.measured_s, rel=0.05)
        assert all(len(r.survival) >= r.verified for r in record.requests)
        assert (record.stop is Stop.RULE) == (policy in ("fixed", "threshold") and record.candidates > 0)
        json.dumps(record.as_dict())
    late = outcome.records[len(outcome.records) // 3 :]
    expected, actual = sum(r.predicted_accepts for r in late), sum(r.accepted for r in late)
    assert expected == pytest.approx(actual, rel=0.1), "overconfidence is corrected"


@pytest.mark.parametrize("policy", ["causal", "auto"])
def test_a_minute_of_steady_load_is_forecast(policy: str) -> None:
    """Overconfident drafts, a table that is off and stalls; yet accepts come within 3 %, seconds within 10 %."""
    believed = replace(
        LARGE,
        verify=tuple((x, 0.7 * y) for x, y in LARGE.verify),
        draft=tuple((x, 2 * y) for x, y in LARGE.draft),
    )
    kinds = replace(EASY, bias=0.8), replace(HARD, bias=0.4)
    simulator = Simulator(LARGE, kinds, policy, max_running=8, believed=believed, noise=0.1, stalls=0.01, seed=3)
    load = [Arrival(0.0, 64, 200, number % 2) for number in range(330)]
    records, seconds = [], 0.0
    for record in reversed(simulator.run(load, 100_000).records):
        records.append(record)
        seconds += record.measured_s
        if seconds > 60:
            break
    assert seconds > 60
    accepted = sum(r.accepted for r in records)
    assert accepted > 5_000
    assert sum(r.predicted_accepts for r in records) == pytest.approx(accepted, rel=0.03)
    assert sum(r.predicted_s for r in records) == pytest.approx(seconds, rel=0.1)


def test_priority_buys_verification() -> None:
    """Where rows are dear, the favoured request's tokens are verified and the others' are not."""
    table = replace(SMALL, draft=((1.0, 1e-5), (64.0, 1e-4)), absorb=((1.0, 1e-6), (64.0, 1e-6)))
    simulator = Simulator(table, (HARD,), "auto", max_running=8)
    load = [Arrival(0.0, 64, 200, 0, priority=8 if i == 0 else 0) for i in range(8)]
    requests = [r for record in simulator.run(load, 10_000).records for r in record.requests]
    verified = {weight: [r.verified for r in requests if r.weight == weight] for weight in {r.weight for r in requests}}
    mean = {weight: sum(lengths) / len(lengths) for weight, lengths in verified.items()}
    assert mean[4.0] > 2 * mean[1.0]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text(json.dumps(asdict(LARGE)))
    (tmp_path / "acceptance.json").write_text(json.dumps([asdict(EASY), asdict(HARD)]))
    files = ["simulate", "--table", str(tmp_path / "table.json"), "--acceptance", str(tmp_path / "acceptance.json")]
    assert main([*files, "--concurrency", "4", "--requests", "8", "--tokens", "32", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["requests"] == 8 and summary["tokens_per_s"] > 100
    assert main([*files, "--rate", "5", "--seconds", "4", "--tokens", "32", "--replicas", "2"]) == 0
    assert "latency_s_p95" in capsys.readouterr().out
    (tmp_path / "acceptance.json").write_text("[{}]")
    assert main([*files]) == 2
    assert "acceptance.json" in capsys.readouterr().err
