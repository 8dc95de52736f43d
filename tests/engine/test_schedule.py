"""Who runs, how many rows, how long the drafts: bounds that every plan keeps, and lengths as pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import POLICIES, EngineConfig
from engine.errors import LoadError
from engine.schedule.lengths import Candidate, threshold_length
from engine.schedule.policies import StaticLengths, make_policy
from engine.types import DraftBlock, Sampling, Speculation, SpeculationMode
from tests.engine.helpers import (
    FIXED,
    GREEDY,
    OFF,
    PAGE_BYTES,
    THRESHOLD,
    load,
    request,
    run,
    scripted,
    text,
    watch_plans,
)

Drafters = Callable[..., Path]
PROMPT = tuple(range(50))


def test_chunks_are_bounded(target_dir: Path, drafter_dir: Drafters, prompts: list[tuple[int, ...]]) -> None:
    """With others decoding a round holds at most prefill_chunk prompt rows, alone at most max_batch_tokens."""
    engine = load(target_dir, drafter_dir(), policy="fixed", prefill_chunk=9, max_batch_tokens=60, max_running=10)
    plans = watch_plans(engine)
    run(engine, [request(str(i), prompt, 12) for i, prompt in enumerate(prompts)])
    mixed = 0
    for plan in plans:
        prompt_rows = sum(row.count for row in plan.rows if not row.drafted and row.count > 1)
        chunks = [r for r in plan.rows if r.count > 1 and not r.drafted]
        decoding = len(plan.rows) - len(chunks)
        assert sum(row.count for row in plan.rows) <= 60
        if decoding > 1:
            assert prompt_rows <= 9
            mixed += prompt_rows > 0
        assert prompt_rows <= 60
    assert mixed, "prompts were meant to enter while others decode"


def test_a_prompt_is_run_once_and_in_order(target_dir: Path) -> None:
    engine = load(target_dir, prefill_chunk=7, max_batch_tokens=16, max_running=4)
    plans = watch_plans(engine)
    run(engine, [request("a", PROMPT, 3)])
    spans = [(row.start, row.count, row.needs_token) for plan in plans for row in plan.rows]
    assert spans == [(0, 16, False), (16, 16, False), (32, 16, False), (48, 2, True), (50, 1, True), (51, 1, True)]


def test_priority_goes_first_then_arrival(target_dir: Path) -> None:
    engine = load(target_dir, max_running=1)
    order: list[str] = []
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        engine.submit(request(name, PROMPT[:5], 2, priority=priority))
    while engine.has_work:
        order += [delta.request_id for delta in engine.step() if delta.finish]
    assert order == ["high", "first", "second", "low"]


def test_max_running(target_dir: Path) -> None:
    engine = load(target_dir, max_running=3)
    for i in range(8):
        engine.submit(request(str(i), PROMPT[:5], 4))
    while engine.has_work:
        engine.step()
        assert len(engine.running) <= 3


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("room", [0, 1, 2, 5, 40])
def test_max_tokens_and_context_are_never_exceeded(target_dir: Path, tokens: int, room: int) -> None:
    """Not even with drafts that are all accepted; and no draft is verified that could not be kept."""
    plain = text(load(target_dir), request("a", PROMPT[:40], 40))
    limit = 40 + 1 + room
    engine = scripted(target_dir, {PROMPT[:40]: plain}, block=5, max_model_len=limit)
    plans = watch_plans(engine)
    result = run(engine, [request("a", PROMPT[:40], tokens, GREEDY, FIXED)])["a"]
    assert result.tokens == plain[: min(tokens, 1 + room)]
    for plan in plans:
        for row in plan.rows:
            assert row.start + row.count <= limit, "a row beyond the context"
    assert sum(d.verified for d in result.deltas) == sum(d.accepted for d in result.deltas)


@pytest.mark.parametrize("speculation", [
    (OFF, 0), (Speculation(SpeculationMode.FIXED, draft_tokens=2), 2), (Speculation(SpeculationMode.FIXED), 5),
    (Speculation(SpeculationMode.AUTO, max_draft_tokens=3), 3), (Speculation(SpeculationMode.FIXED, draft_tokens=0), 0),
    (Speculation(SpeculationMode.FIXED, draft_tokens=99), 5),
    (Speculation(SpeculationMode.THRESHOLD, confidence_threshold=0.0), 5),
])  # fmt: skip
def test_a_request_says_how_much_to_draft(
    target_dir: Path, drafter_dir: Drafters, speculation: tuple[Speculation, int]
) -> None:
    wish, most = speculation
    engine = load(target_dir, drafter_dir(), policy="fixed")
    deltas = run(engine, [request("a", PROMPT[:9], 30, Sampling(seed=1), wish)])["a"].deltas
    assert max(delta.verified for delta in deltas) == most
    assert all(delta.accepted <= delta.verified <= delta.drafted for delta in deltas)
    assert max(delta.drafted for delta in deltas) == most, "nothing is drafted that could not be verified"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_decides_for_requests_that_do_not(target_dir: Path, drafter_dir: Drafters, policy: str) -> None:
    engine = load(target_dir, drafter_dir(), policy=policy, confidence_threshold=0.6)
    deltas = run(engine, [request("a", PROMPT[:9], 40, Sampling(seed=1))])["a"].deltas
    lengths = {d.verified for d in deltas if d.decode_round and d.drafted}
    assert lengths == set() if policy == "plain" else 5 in lengths if policy == "fixed" else len(lengths) > 1


def test_thresholds_follow_the_confidences(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed")
    assert engine.drafter is not None
    propose, plans = engine.drafter.propose, watch_plans(engine)
    confidences: list[list[float]] = []  # a block stands until the next is drafted

    def watched(*given: Any) -> DraftBlock:
        block = propose(*given)
        assert block.confidence is not None
        confidences.append(block.confidence[0].tolist())
        return block

    engine.drafter.propose = watched  # type: ignore[method-assign]
    wish = Speculation(SpeculationMode.THRESHOLD, confidence_threshold=0.55)
    run(engine, [request("a", PROMPT[:9], 40, Sampling(seed=2), wish)])
    rows = [plan.rows[0] for plan in plans if plan.rows[0].drafted]
    assert len(rows) == len(confidences)
    for row, confidence in zip(rows, confidences, strict=True):
        high = [value >= 0.55 for value in confidence]
        longest = len(list(itertools.takewhile(bool, high)))
        assert row.draft_length == longest or (row.draft_length < longest and row is rows[-1])


def test_lengths_are_non_anticipating() -> None:
    """Confidences after the first refused one, and after the limit, change nothing."""
    base = [0.9, 0.8, 0.3, 0.9, 0.9]
    for tail in itertools.product((0.0, 0.5, 1.0), repeat=2):
        assert threshold_length([*base[:3], *tail], 5, 0.5) == 2
    assert threshold_length(base, 1, 0.5) == 1
    assert threshold_length(None, 4, 0.5) == 4
    assert threshold_length([0.5], 1, 0.5) == 1, "at least the threshold is enough"


def test_lengths_are_pure() -> None:
    policy = StaticLengths(SpeculationMode.FIXED, 3, 0.5)
    candidates = [
        Candidate([0.9, 0.4, 0.9], 3, Speculation()),
        Candidate([0.9, 0.4, 0.9], 3, THRESHOLD),
        Candidate([0.9, 0.4, 0.9], 2, FIXED),
        Candidate(None, 1, Speculation(SpeculationMode.THRESHOLD, confidence_threshold=0.99)),
    ]
    assert policy.choose(candidates).lengths == policy.choose(candidates).lengths == [3, 1, 2, 1]
    for order in itertools.permutations(range(4)):
        assert policy.choose([candidates[i] for i in order]).lengths == [[3, 1, 2, 1][i] for i in order]


def test_nobody_is_preempted_for_a_draft(target_dir: Path, drafter_dir: Drafters) -> None:
    """Three pages: the first takes the spare one for its block, the second decodes plainly in its own."""
    engine = load(target_dir, drafter_dir(), policy="fixed", kv_memory=3 * PAGE_BYTES, max_model_len=48)
    assert engine.pool.total == 3
    plans = watch_plans(engine)
    engine.submit(request("a", PROMPT[:12], 20))
    engine.submit(request("b", PROMPT[20:32], 20))
    engine.step()
    engine.step()
    assert [(row.drafted, row.count) for row in plans[1].rows] == [(5, 6), (0, 1)]
    assert not engine.waiting
    engine.check()


@pytest.mark.parametrize(("name", "value"), [
    ("threads", 0), ("kv_memory", 0), ("max_running", 0), ("max_batch_tokens", -1), ("prefill_chunk", 0),
    ("max_queue", 0), ("max_model_len", 1), ("policy", "best"), ("confidence_threshold", 1.5), ("draft_tokens", -1),
    ("dtype", "int8"),
])  # fmt: skip
def test_configuration_errors_name_the_setting(name: str, value: object) -> None:
    with pytest.raises(LoadError, match=name):
        EngineConfig(model="m", **{name: value})  # type: ignore[arg-type]


def test_a_round_must_hold_a_row_for_everyone() -> None:
    with pytest.raises(LoadError, match="raise it to 40"):
        EngineConfig(model="m", max_batch_tokens=39, max_running=32, prefill_chunk=8)


def test_policies_by_name() -> None:
    def name(policy: str) -> str | None:
        made = make_policy(EngineConfig(model="m", policy=policy))
        return made.name if made else None

    assert [name(p) for p in POLICIES] == [None, *POLICIES[1:]]
