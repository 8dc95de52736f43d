"""Requests that sit out keep their features waiting; once absorbed, the drafter's caches are as if they never had."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.schedule.record import RoundRecord, Sitting, Stop
from engine.types import DraftBlock, Phase, StepPlan, Verdict
from tests.engine.helpers import FIXED, OFF, THRESHOLD, coupled, load, request, run

Drafters = Callable[..., Path]
PROMPT = tuple(range(20))


def waits(target_dir: Path, drafter_dir: Drafters) -> Engine:
    """An engine whose requests are followed, and never draft."""
    engine = load(target_dir, drafter_dir(), policy="plain")
    engine.scheduler.planner.follows = lambda *_: True  # type: ignore[method-assign]
    return engine


def decode(engine: Engine, rounds: int) -> None:
    while not engine.running or engine.running[0].phase is not Phase.DECODE:
        engine.step()
    for _ in range(rounds):
        engine.step()


def test_what_waited_is_absorbed_as_if_it_never_had(target_dir: Path, drafter_dir: Drafters) -> None:
    """The same text, absorbed round by round or at once after twelve: the same block is proposed, bit for bit."""
    blocks, waited = [], []
    for limit in (0, 2**20):
        engine = waits(target_dir, drafter_dir)
        assert engine.backlog is not None and engine.drafter is not None
        engine.backlog.limit_bytes = limit
        engine.submit(request("a", PROMPT, 60, coupled(5)))
        decode(engine, 12)
        (sequence,) = engine.running
        waited.append(sequence.deferred)
        engine.backlog.catch_up([sequence])
        assert sequence.deferred == 0 and sequence.absorbed == sequence.kv_length
        blocks.append(engine.drafter.propose((sequence,)))
    assert waited == [1, 12]
    eager, late = blocks
    assert eager.tokens.tolist() == late.tokens.tolist()
    assert eager.confidence is not None and late.confidence is not None
    assert eager.confidence.tolist() == late.confidence.tolist()


@pytest.mark.parametrize("limit", [0, 3000])
def test_only_so_much_may_wait(target_dir: Path, drafter_dir: Drafters, limit: int) -> None:
    engine = waits(target_dir, drafter_dir)
    assert engine.backlog is not None
    engine.backlog.limit_bytes = limit
    for name in "ab":
        engine.submit(request(name, PROMPT, 30, coupled(1)))
    most = 0
    while engine.has_work:
        engine.step()
        engine.check()
        most = max(most, sum(s.deferred for s in engine.running))
    assert most <= 2 + limit // 256
    assert run(engine, [request("c", PROMPT, 8, coupled(1), FIXED)])["c"].tokens


def test_mixed_rounds_absorb_only_for_those_that_draft(target_dir: Path, drafter_dir: Drafters) -> None:
    plain = run(load(target_dir), [request(str(i), PROMPT[: 5 + i], 40, coupled(i), OFF) for i in range(4)])
    engine = load(target_dir, drafter_dir(), policy="fixed")
    wishes = (OFF, FIXED, OFF, THRESHOLD)
    mixed = run(engine, [request(str(i), PROMPT[: 5 + i], 40, coupled(i), wishes[i]) for i in range(4)])
    assert {name: result.tokens for name, result in mixed.items()} == {n: r.tokens for n, r in plain.items()}
    assert mixed["1"].drafted_tokens_kept > 0 and mixed["0"].drafted_tokens_kept == 0


def test_every_round_is_recorded(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed", history=10)
    heard: list[RoundRecord] = []
    engine.history.observer = lambda finished: heard.append(finished.record())
    wishes = (OFF, FIXED)
    results = run(engine, [request(str(i), PROMPT, 24, coupled(i), wishes[i]) for i in range(2)])
    assert len(heard) == engine.rounds and engine.history.last() == heard[-10:]
    assert engine.history.last(3) == heard[-3:] and engine.history.last(0) == []
    assert sum(r.accepted for r in heard) >= sum(result.drafted_tokens_kept for result in results.values())
    assert heard[0].prefill_rows == 2 * len(PROMPT) and not heard[0].requests and heard[0].stop is Stop.NOBODY
    for record in heard[1:]:
        assert pickle.loads(pickle.dumps(record)) == record
        for one in record.requests:
            assert one.sitting in ((Sitting.OFF,) if one.request_id == "0" else (Sitting.ASKED, Sitting.NO_ROOM))
            assert one.accepted <= one.verified <= one.drafted
        assert record.measured_s > 0 and record.predicted_s > 0


@pytest.mark.parametrize("first", [True, False])
def test_who_is_followed_by_now_leaves_no_hole(target_dir: Path, drafter_dir: Drafters, first: bool) -> None:
    """Of two that decode one is followed; then, beside the same one, the other is, too: both can draft."""
    engine = waits(target_dir, drafter_dir)
    assert engine.backlog is not None and engine.drafter is not None
    for name in "ab":
        engine.submit(request(name, PROMPT, 60, coupled(1)))
    decode(engine, 1)
    one, other = engine.running if first else engine.running[::-1]
    engine.backlog.catch_up([s for s in engine.running if s.followed])
    other.followed = False
    decode(engine, 6)
    assert one.deferred == 6
    # As after running once more from its beginning: nothing is missing, and from here on it is followed.
    other.followed, other.absorbed = True, other.kv_length
    decode(engine, 3)
    assert (one.deferred, other.deferred) == (9, 3)
    engine.backlog.catch_up([s for s in engine.running if s.followed])
    assert one.deferred == other.deferred == 0


@pytest.mark.parametrize("bystanders", [0, 1])
def test_features_are_written_where_they_stay(target_dir: Path, drafter_dir: Drafters, bystanders: int) -> None:
    """What waits for a sequence is, bit for bit, what its rounds brought, beside others that nobody follows, too."""
    engine = load(target_dir, drafter_dir(), policy="plain")
    engine.scheduler.planner.follows = lambda sequence, *_: sequence.request.request_id in "ac"  # type: ignore[method-assign]
    for name in "abc" if bystanders else "ac":
        engine.submit(request(name, (*PROMPT, ord(name) - 90), 90))
    while any(s.phase is not Phase.DECODE for s in [*engine.running, *engine.waiting]):
        engine.step()
    assert engine.backlog is not None
    engine.backlog.catch_up([s for s in engine.running if s.followed])
    verify, placed = engine.verifier.run, []
    expected: dict[str, list[torch.Tensor]] = {"a": [], "c": []}

    def watched(plan: StepPlan, block: DraftBlock | None) -> Verdict:
        verdict = verify(plan, block)
        assert verdict.features is not None
        for row, features in zip(plan.rows, verdict.features.clone(), strict=True):
            if row.sequence.followed:
                expected[row.sequence.request.request_id].append(features)
        placed.append(verdict.placed)
        return verdict

    engine.verifier.run = watched  # type: ignore[method-assign]
    for _ in range(40):  # more than a stretch has room for at once
        engine.step()
    assert placed == [True] * 40
    for sequence in engine.running:
        own = [kept for stretch in engine.backlog._stretches if (kept := stretch.of(sequence)) is not None]
        if sequence.followed:
            assert torch.cat(own).equal(torch.stack(expected[sequence.request.request_id]))
        else:
            assert not own
