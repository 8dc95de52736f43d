"""Copies: found where they stand, verified like any draft, given up where they do not pay; no text changes by them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import lookup
from engine.engine import Engine
from engine.lookup import MOST, WIDTH, Passages, PromptLookup
from engine.schedule.planner import Planner
from engine.schedule.record import Sitting
from engine.types import Phase, Sampling, Sequence, Speculation, SpeculationMode, Verification
from tests.engine.helpers import FIXED, GREEDY, OFF, coupled, load, request, run

Drafters = Callable[..., Path]
LOOP = (5, 9, 3, 7, 1, 5, 9, 3, 7, 1, 5, 9, 3, 7)


def state(tokens: tuple[int, ...], **more: object) -> Sequence:
    one = request("a", tokens, 200, **more)  # type: ignore[arg-type]
    return Sequence(one, 1, Verification.REJECTION, list(tokens), 0, phase=Phase.DECODE, prompt_length=len(tokens))


def free() -> float:
    return 0.01


def for_nothing() -> float:
    return 0.0


def copies(engine: Engine) -> int:
    return sum(r.sitting is Sitting.LOOKUP for record in engine.history.last() for r in record.requests)


def slowly(tokens: list[int]) -> tuple[int, int]:
    """Passages.find by looking through everything."""
    found = (0, 0)
    for start in range(WIDTH, len(tokens)):
        agree = 0
        while agree < min(start, 32) and tokens[start - 1 - agree] == tokens[-1 - agree]:
            agree += 1
        if agree >= WIDTH:
            found = start, agree
    return found


def test_the_last_passage_that_ended_alike_is_found_while_the_text_grows() -> None:
    generator = random.Random(4)
    tokens = [generator.randrange(3) for _ in range(600)]
    passages, hits, at = Passages(), 0, 0
    while at < 600:
        at = min(at + generator.choice((1, 1, 2, 7)), 600)
        found = passages.find(tokens[:at])
        assert found == slowly(tokens[:at])
        hits += found != (0, 0)
    assert hits > 100


def test_what_was_found_stays_found_when_the_index_grows() -> None:
    generator = random.Random(5)
    tokens = [generator.randrange(40_000) for _ in range(3000)]
    passages = Passages()
    for at in (50, 51, 400, 2999, 3000):
        assert passages.find(tokens[:at]) == (0, 0)
    for start in (7, 60, 1500, 2900):
        tokens += tokens[start : start + 9]
        assert passages.find(tokens) == (start + 9, 9)


def test_a_copy_that_runs_into_itself_goes_round() -> None:
    (copy,) = PromptLookup().propose([state(LOOP)], 1, lambda _: 100, free, for_nothing)
    assert copy.tokens == ((1, 5, 9, 3, 7) * 3)[:MOST]
    assert list(copy.survival) == sorted(copy.survival, reverse=True) and copy.survival[0] < 1


def test_who_never_repeats_is_looked_at_ever_less_often_and_still_found_when_that_changes() -> None:
    lookup, sequence, looks = PromptLookup(), state(tuple(range(100, 120))), 0
    for token in range(200, 400):
        if lookup.rest:
            lookup.rest -= 1
        else:
            assert not lookup.propose([sequence], 1, lambda _: 100, free, for_nothing)
            looks += 1
        sequence.tokens.append(token)
    assert 200 / 9 <= looks <= 200 / 4
    for waited in range(16):  # it begins to repeat itself
        sequence.tokens.append(300 + waited)
        if lookup.rest:
            lookup.rest -= 1
        elif found := lookup.propose([sequence], 1, lambda _: 100, free, for_nothing):
            break
    assert waited <= WIDTH + 8 and found[0].tokens[0] == 301 + waited


def test_where_looks_are_not_worth_their_time_they_are_rare_until_one_pays() -> None:
    lookup, dull = PromptLookup(), state(tuple(range(100, 120)))
    looks = [0]
    for number in range(1000):
        if lookup.rest:
            lookup.rest -= 1
        else:
            lookup.propose([dull], 1, lambda _: 100, free, lambda: 0.05)
        assert dull.passages is not None
        looks.append(dull.passages.quiet)
        dull.tokens.append(1000 + number)
    assert looks[100] > 20 and 7 <= looks[1000] - looks[700] <= 10
    (copy,) = lookup.propose([state(LOOP)], 1, lambda _: 100, free, lambda: 0.05)
    lookup.learn(copy, len(copy.tokens))
    fresh = state(tuple(range(20)))
    for place in range(3):
        lookup.propose([fresh], 1, lambda _: 100, free, lambda: 0.05)
        fresh.tokens.append(50 + place)
    assert fresh.passages is not None and fresh.passages.quiet == 3 and not fresh.passages.rest


def test_where_no_look_can_be_paid_for_nobody_is_asked() -> None:
    """To ask takes time, too. A newcomer whose kind is not in doubt need not wait for that."""
    lookup, dull, calls = PromptLookup(), state(tuple(range(100, 120))), 0
    for number in range(2000):
        if number == 1000:
            calls, before = 0, dull.passages.quiet if dull.passages is not None else 0
        if lookup.rest:
            lookup.rest -= 1
        else:
            lookup.propose([dull], 1, lambda _: 100, free, lambda: 0.05)
            calls += 1
        dull.tokens.append(1000 + number)
    assert dull.passages is not None
    assert 15 <= dull.passages.quiet - before <= calls <= 2.5 * (dull.passages.quiet - before)
    waits = []
    for start in (100, 200, 300):  # of a kind in doubt: each is looked at as soon as that can be paid for
        comer = state(tuple(range(start, start + 20)))
        lookup.greet([comer], [dull], lambda: 0.05)
        waits.append(lookup.rest)
        lookup.rest = 0
        lookup.propose([dull, comer], 2, lambda _: 100, free, lambda: 0.05)
        assert comer.passages is not None and comer.passages.quiet == 1
    assert 10 <= max(waits) <= 32
    assert lookup.rest > 0
    long, own = lookup.rest, dull.passages.rest
    lookup.greet([state(tuple(range(20)), sampling=Sampling(temperature=1.0))], [dull], lambda: 0.05)
    assert lookup.rest == 0 and dull.passages.rest == own + long
    lookup.rest = 20
    back = state(tuple(range(20)))  # gave way, having copied, and comes back
    back.passages = Passages(copied=5)
    lookup.greet([back], [dull], lambda: 0.05)
    assert lookup.rest == 0


def test_who_comes_in_doubt_is_looked_at_within_a_share_and_before_others() -> None:
    lookup, dull = PromptLookup(), state(tuple(range(100, 120)))
    for number in range(600):  # looks are not worth their time
        lookup.rest = max(lookup.rest - 1, 0)
        if not lookup.rest:
            lookup.propose([dull], 1, lambda _: 100, free, lambda: 0.05)
        dull.tokens.append(1000 + number)
    comers = [state(tuple(range(start, start + 20))) for start in range(2000, 10_000, 40)]
    for comer in comers:
        lookup.greet([comer], [dull], lambda: 0.05)
        for token in range(15):
            if lookup.rest:
                lookup.rest -= 1
            else:
                lookup.propose([dull, comer], 2, lambda _: 100, free, lambda: 0.05)
            comer.tokens.append(20_000 + token)
    share = 0.002 * 2 / 0.05 * 15 * len(comers)
    looked = sum(comer.passages.quiet > 0 for comer in comers if comer.passages is not None)
    assert 0.5 * share < looked <= share + 2


def test_copies_are_as_long_as_the_limit_and_the_price_allow() -> None:
    (copy,) = PromptLookup().propose([state(LOOP)], 1, lambda _: 4, free, for_nothing)
    assert copy.tokens == (1, 5, 9, 3)
    (copy,) = PromptLookup().propose([state(LOOP)], 1, lambda _: 100, lambda: 0.5, for_nothing)
    assert 0 < len(copy.tokens) < MOST and copy.survival[-1] > 0.5
    assert not PromptLookup().propose([state(LOOP)], 1, lambda _: 100, lambda: 0.99, for_nothing)
    assert not PromptLookup().propose([state(LOOP)], 1, lambda _: 0, free, for_nothing)


def test_what_is_never_kept_is_given_up_and_tried_again_later() -> None:
    finds, sequence, tried = PromptLookup(), state(LOOP), []
    for round_ in range(1500):
        for copy in finds.propose([sequence], 1, lambda _: 100, lambda: 0.3, for_nothing):
            finds.learn(copy, 0)
            tried.append(round_)
    assert 3 < len(tried) < 100 and tried[-1] > 500
    fresh = state(LOOP)
    early = len(finds.propose([fresh], 1, lambda _: 100, free, for_nothing)[0].tokens)
    assert early == MOST, "free rows are always worth it"


def test_what_is_kept_is_believed() -> None:
    finds, sequence = PromptLookup(), state(LOOP)
    for _ in range(50):
        (copy,) = finds.propose([sequence], 1, lambda _: 100, free, for_nothing)
        finds.learn(copy, len(copy.tokens))
    assert copy.survival[-1] > 0.9


@pytest.fixture
def loose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever followed the same token is copied at any price: plenty of copies, most of them wrong."""
    monkeypatch.setattr(lookup, "WIDTH", 1)
    monkeypatch.setattr(lookup.CopyTimes, "fixed_price", lambda *_: -1.0)
    monkeypatch.setattr(Planner, "row_price", lambda _: 0.0)
    monkeypatch.setattr(Planner, "look_price", lambda _: 0.0)


def test_texts_are_those_of_plain_decoding(loose: None, target_dir: Path, drafter_dir: Drafters) -> None:
    prompts = [tuple(random.Random(i).randrange(6) for _ in range(9 + i)) for i in range(6)]
    kinds = [GREEDY, coupled(3), coupled(4, 0.7, top_p=0.9), GREEDY, coupled(5, repetition_penalty=1.2), coupled(6)]
    requests = [request(str(i), p, 60, kind) for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))]
    plain = run(load(target_dir), requests)
    engine = load(target_dir, drafter_dir(), history=4096)
    found = run(engine, requests)
    assert {name: r.tokens for name, r in found.items()} == {name: r.tokens for name, r in plain.items()}
    assert copies(engine) > 20
    kept = sum(result.drafted_tokens_kept for result in found.values())
    assert 0 < kept < sum(delta.verified for result in found.values() for delta in result.deltas)
    assert copies(load_without(requests, target_dir, drafter_dir)) == 0


def load_without(requests: list, target_dir: Path, drafter_dir: Drafters) -> Engine:
    engine = load(target_dir, drafter_dir(), lookup=False, history=4096)
    run(engine, requests)
    return engine


def test_who_asks_for_something_else_does_not_copy(loose: None, target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), history=4096)
    capped = Speculation(SpeculationMode.AUTO, max_draft_tokens=2)
    wishes = {"off": OFF, "fixed": FIXED, "two": capped}
    run(engine, [request(name, LOOP, 60, GREEDY, wish) for name, wish in wishes.items()])
    told = [r for record in engine.history.last() for r in record.requests if r.sitting is Sitting.LOOKUP]
    assert {r.request_id for r in told} == {"two"} and max(r.verified for r in told) <= 2
    for policy in ("fixed", "causal", "plain"):
        engine = load(target_dir, drafter_dir(), policy=policy, history=4096)
        run(engine, [request("a", LOOP, 40)])
        assert copies(engine) == 0


def test_records_say_what_was_copied(loose: None, target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), history=4096)
    found = run(engine, [request(str(i), LOOP, 60) for i in range(3)])
    for record in engine.history.last():
        told = [r for r in record.requests if r.sitting is Sitting.LOOKUP]
        for one in told:
            assert one.drafted == one.verified == len(one.survival) >= one.accepted
        assert record.verified >= sum(one.verified for one in told)
        assert record.predicted_accepts == pytest.approx(sum(sum(r.survival[: r.verified]) for r in record.requests))
    deltas = [delta for result in found.values() for delta in result.deltas]
    assert sum(delta.accepted for delta in deltas) + 3 + sum(d.decode_round for d in deltas) == 180
    assert all(delta.verified <= delta.drafted for delta in deltas)


def test_features_of_copied_tokens_are_absorbed_when_it_drafts(
    loose: None, target_dir: Path, drafter_dir: Drafters
) -> None:
    """The same text, decoded with copies or without: the drafter proposes the same block, bit for bit."""
    blocks, copied = [], []
    for copying in (False, True):
        engine = load(target_dir, drafter_dir(), lookup=copying, history=4096)
        assert engine.backlog is not None and engine.drafter is not None
        engine.scheduler.planner.follows = lambda *_: True  # type: ignore[method-assign]
        engine.scheduler.planner.who_drafts = lambda *_: []  # type: ignore[method-assign]
        engine.scheduler.planner.learn = lambda *_: None  # type: ignore[method-assign,assignment]
        engine.history.add = lambda *_: None  # type: ignore[method-assign]
        engine.scheduler.lookup.times.learn = lambda *_: None  # type: ignore[method-assign]
        for name in "ab":
            engine.submit(request(name, LOOP, 60))
        while not engine.running or engine.running[0].phase is not Phase.DECODE:
            engine.step()
        rounds = 0
        while len(engine.running[0].tokens) < 50:
            engine.step()
            engine.check()
            rounds += 1
        copied.append(rounds)
        sequence = engine.running[0]
        kept = sequence.absorbed
        engine.backlog.catch_up([sequence])
        assert kept < sequence.absorbed == sequence.kv_length
        sequence.tokens[50:] = []
        sequence.kv_length = sequence.absorbed = 49
        blocks.append(engine.drafter.propose((sequence,)))
    assert copied[1] < copied[0]
    for name in ("tokens", "confidence"):
        first, second = (getattr(block, name).tolist() for block in blocks)
        assert first == second
