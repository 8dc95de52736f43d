"""Features are kept only of requests that may draft; the others cost what they would without a drafter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.batch import build_batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import warm_up
from engine.pages import PagePool
from engine.schedule import following, native_books, native_following, native_gate, native_outlook, native_sheet
from engine.schedule.loads import Arrival
from engine.schedule.planner import Planner
from engine.schedule.policies import make_policy
from engine.schedule.simulate import Simulator
from engine.types import EndConditions, Phase, PlanRow, Request, Sequence, StepPlan, Verdict, Verification
from tests.engine.helpers import FIXED, OFF, coupled, generate, load, request, run
from tests.engine.test_simulate import EASY, HARD, SMALL, play

Drafters = Callable[..., Path]
PROMPT = tuple(torch.randint(96, (53,), generator=torch.Generator().manual_seed(1)).tolist())


def watch_features(engine: Engine) -> list[torch.Tensor | None]:
    """The features of every round to come."""
    found: list[torch.Tensor | None] = []
    verify = engine.verifier.run

    def watched(plan: StepPlan, block: object) -> Verdict:
        verdict = verify(plan, block)  # type: ignore[arg-type]
        found.append(None if verdict.features is None else verdict.features.clone())
        return verdict

    engine.verifier.run = watched  # type: ignore[method-assign]
    return found


def test_whoever_may_not_draft_is_not_followed(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed")
    features = watch_features(engine)
    run(engine, [request("a", PROMPT, 9, speculation=OFF)])
    assert features and all(kept is None for kept in features)
    run(engine, [request("b", PROMPT, 9)])
    assert features[-1] is not None
    engine.update_policy({"policy": "plain"})
    features.clear()
    run(engine, [request("c", PROMPT, 9, speculation=FIXED)])
    assert all(kept is None for kept in features)


def test_only_the_followed_rows_are_kept(target_dir: Path, drafter_dir: Drafters) -> None:
    """Beside others that nobody follows, a sequence's features are the bits that they are alone."""
    engine = load(target_dir, drafter_dir(), policy="plain")
    for name in "abc":
        engine.submit(request(name, (*PROMPT[:9], ord(name) - 90), 30))
    while any(s.phase is not Phase.DECODE for s in [*engine.running, *engine.waiting]):
        engine.step()
    middle = engine.running[1]
    plan = StepPlan(tuple(PlanRow(s, s.kv_length, 1) for s in engine.running))
    for sequence in engine.running:
        sequence.followed = True
    whole = build_batch(plan, None, engine.target.device)
    assert whole.kept is None
    for sequence in engine.running:
        sequence.followed = sequence is middle
    part = build_batch(plan, None, engine.target.device)
    assert part.kept is not None and part.kept.tolist() == [0, 1, 0]
    layers = engine.verifier.capture
    _, everything = engine.target.forward(whole, layers)
    _, kept = engine.target.forward(part, layers)
    assert everything is not None and kept is not None
    assert kept[1].tolist() == everything[1].tolist()


@pytest.mark.parametrize("drafter", ["vanilla", "none"])
def test_pages_without_the_drafters_half_serve_those_that_need_none(
    drafter: str, hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters
) -> None:
    engine = load(target_dir, drafter_dir(head=drafter), policy="fixed")
    expected = generate(hf_target, PROMPT, 12)
    seen = []
    for name, wish in (("a", OFF), ("b", OFF), ("c", FIXED), ("d", FIXED), ("e", OFF)):
        result = run(engine, [request(name, PROMPT, 12, speculation=wish)])[name]
        assert result.tokens == expected
        seen.append(result.cached)
    assert seen == [0, 48, 0, 48, 48], "c needs features that nobody kept, and leaves whole pages"


def test_a_beginning_that_comes_again_is_run_for_those_to_come_too(target_dir: Path, drafter_dir: Drafters) -> None:
    """Whoever is followed runs rows again that others ran without features: the oftener they are found, the less of
    that is on its own account; once it has, nothing is left to run."""
    engine = load(target_dir, drafter_dir(), policy="auto", prefix_cache=True)
    spared: list[float] = []
    follow = [False]

    def follows(*given: object) -> bool:
        spared.append(float(given[-1]))  # type: ignore[arg-type]
        return follow[0]

    engine.scheduler.planner.follows = follows  # type: ignore[method-assign]
    for name in ("first", "second", "third", "fourth"):
        follow[0] = name == "third"
        run(engine, [request(name, PROMPT, 1)])
    assert spared == [0.0, 48 / 2, 48 / 3, 0.0]
    engine.check()


def test_a_bare_page_yields_to_a_whole_one() -> None:
    pool = PagePool(4)
    first, second, third = (pool.allocate(1) or [] for _ in range(3))
    pool.publish(first[0], b"x", whole=False)
    pool.publish(second[0], b"x", whole=False)
    assert pool.published(b"x") is False and pool.lookup(b"x") == first[0]
    pool.release(first * 2)
    assert pool.idle == 1
    pool.publish(third[0], b"x")
    assert pool.published(b"x") is True and (pool.idle, pool.free) == (0, 2)
    pool.publish(second[0], b"x", whole=False)
    assert pool.lookup(b"x") == third[0]
    pool.check([second, third, third])
    pool.release([*second, *third, *third])
    assert pool.allocate(4) is not None and pool.published(b"x") is None
    pool.check()


@pytest.mark.parametrize("seed", [None, 3])
def test_a_policy_that_drafts_runs_them_again(seed: int | None, target_dir: Path, drafter_dir: Drafters) -> None:
    """Switched on in the middle of requests: they draft, and their texts do not change."""
    sampling = {"a": coupled(seed), "b": coupled(seed + 1)} if seed is not None else {}
    todo = [
        request(n, (*PROMPT, ord(n) - 90), 60, **({"sampling": sampling[n]} if n in sampling else {})) for n in "ab"
    ]
    expected = {name: result.tokens for name, result in run(load(target_dir), todo).items()}
    engine = load(target_dir, drafter_dir(), policy="plain")
    for one in todo:
        engine.submit(one)
    deltas = [delta for _ in range(10) for delta in engine.step()]
    assert not any(sequence.followed for sequence in engine.running)
    engine.update_policy({"policy": "fixed"})
    while engine.has_work:
        deltas += engine.step()
        engine.check()
    for name, tokens in expected.items():
        own = [delta for delta in deltas if delta.request_id == name]
        assert [token for delta in own for token in delta.tokens] == tokens
        assert sum(delta.drafted > 0 for delta in own) >= 5
        assert sum(delta.cached_tokens is not None for delta in own) == 1, "announced once"


def test_where_drafting_loses_hardly_anybody_is_followed() -> None:
    """Long prompts and dear absorbing: what a drafter costs where it cannot win is bounded by what scouts may take."""
    table = replace(SMALL, absorb=((1.0, 0.2e-3), (64.0, 2e-3), (512.0, 16e-3)))

    def speed(policy: str) -> float:
        simulator = Simulator(table, (HARD,), policy, max_running=8)
        return simulator.run([Arrival(0.0, 160, 64, 0)] * 240).tokens_per_s

    assert speed("auto") >= 0.98 * speed("plain")


def test_a_long_request_drafts_once_the_others_are_gone() -> None:
    """Admitted where drafting does not pay, thus not followed; alone it does, and it begins again for that."""
    easy = play(SMALL, EASY, "auto", 1)
    assert easy.drafted_rounds > 0.5 * easy.rounds
    simulator = Simulator(SMALL, (HARD, EASY), "auto", max_running=24)
    crowd = [Arrival(0.0, 64, 64, 1) for _ in range(300)]
    records = simulator.run([*crowd, Arrival(0.1, 64, 3000, 1)], 100_000).records
    alone = [record.requests[0] for record in records if len(record.requests) == 1]
    assert len(alone) > 100
    assert sum(one.drafted > 0 for one in alone) > 0.5 * len(alone)


@pytest.mark.parametrize("policy", ["plain", "fixed", "auto"])
def test_warming_up_compiles_the_judgement_of_newcomers(
    policy: str, target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first request would wait for it, on a fresh machine for so long that the engine passes for hung."""
    judged, follow = [], native_following.follow

    def watched(*arguments: object) -> int:
        judged.append(arguments)
        verdict: int = follow(*arguments)
        return verdict

    monkeypatch.setattr(native_following, "follow", watched)
    engine = load(target_dir, drafter_dir(), policy=policy)
    warm_up(engine)
    assert judged and engine.config.policy == policy == engine.policy_settings().policy
    assert not engine.has_work and engine.stats().pages_cached == 0


def test_a_scout_that_never_came_in_is_not_remembered() -> None:
    """Not admitted after all, or sent back to the queue, and cancelled there."""
    planner = Simulator(SMALL, (HARD,), "auto").planner
    scout = Sequence(Request("a", (0, 0), EndConditions(50)), 0, Verification.REJECTION, [0, 0], 0, prompt_length=2)
    assert planner.follows(scout, make_policy(EngineConfig("m", policy="auto")), 1, 2)
    assert scout.looks == native_following.LOOKS
    assert planner.following._scouts == [scout]
    planner.who_drafts([], 5, 0, None)
    assert not planner.following._scouts


def test_scouts_that_have_looked_are_followed_no_longer() -> None:
    simulator = Simulator(SMALL, (HARD,), "auto", max_running=8)
    follows, scouts = simulator.planner.follows, []

    def watched(sequence: Sequence, *arguments: object) -> bool:
        followed = follows(sequence, *arguments)  # type: ignore[arg-type]
        if sequence.looks == native_following.LOOKS:
            scouts.append(sequence)
        return followed

    simulator.planner.follows = watched  # type: ignore[method-assign]
    simulator.run([Arrival(0.0, 64, 96)] * 120)
    assert len(scouts) >= native_outlook.KNOWN
    assert all(scout.proposals == native_following.LOOKS and not scout.followed for scout in scouts)


def test_prompts_in_between_do_not_make_a_busy_machine_look_idle() -> None:
    """One of eight decodes, the others' prompts run: it neither begins again nor drafts, as it would alone."""
    for running, begins in ((1, True), (8, False)):
        simulator = Simulator(SMALL, (EASY,), "auto", max_running=8)
        simulator.run([Arrival(0.0, 64, 400, 0)] * 4)  # where hardly anybody else runs, drafting pays
        planner, policy = simulator.planner, make_policy(EngineConfig("m", policy="auto"))
        wish = Request("late", (0,) * 64, EndConditions(400))
        late = Sequence(wish, 0, Verification.REJECTION, [0] * 65, 99, prompt_length=64, kv_length=64)
        late.phase, late.followed = Phase.DECODE, False
        planner.who_drafts([late], 5, 64, policy, running)
        assert (planner.returning is late) == begins


def newcomer(number: int, prompt: int) -> Sequence:
    wish = Request(str(number), (0,) * prompt, EndConditions(100))
    return Sequence(wish, 0, Verification.REJECTION, [0] * prompt, number, prompt_length=prompt)


def test_a_scout_is_whoever_comes_next() -> None:
    """Not who is cheap to follow: short prompts would speak for all. What it takes is saved up before the next."""
    planner, policy = Simulator(SMALL, (HARD,), "auto").planner, make_policy(EngineConfig("m", policy="auto"))
    planner.books.tally[:, -1] = native_following.FIRST  # enough were looked at for the beginning
    planner.memory[native_books.SCOUTS_S] = 0.0
    assert planner.follows(newcomer(1, 400), policy, 4, 400)
    assert planner.memory[native_books.SCOUTS_S] < -2e-3
    assert not planner.follows(newcomer(2, 2), policy, 4, 2)


def test_who_could_only_draft_alone_says_little_of_drafting_together() -> None:
    def after(blocks: int, scout: bool, followed: float) -> float:
        memory = np.full(native_books.MEMORY, 0.5)
        native_following.ended(2.0, blocks, scout, followed, memory)
        return float(memory[native_books.WENT_ON + 1])

    assert after(50, False, 1.0) > 0.6, "it went on"
    assert after(1, False, 1.0) == pytest.approx(0.45)
    assert 0.48 < after(1, False, 0.5) < 0.5
    assert 0.5 < after(native_following.LOOKS, True, 0.5) < 0.55, "nothing was hoped for; try again some day"


def test_one_more_block_costs_what_it_adds() -> None:
    """Two blocks cost hardly more than one. To begin, all must share that; beside one who drafts, little is missing."""
    table = replace(SMALL, draft=((1.0, 1.0e-3), (2.0, 1.05e-3), (64.0, 20e-3)))
    simulator = Simulator(table, (HARD,), "auto", max_running=1)
    simulator.run([Arrival(0.0, 64, 64, 0)] * 40)
    books, cost = simulator.planner.books, simulator.planner.cost
    (own,) = np.flatnonzero(books.tally[:, books.gallery.shape[1]])
    beside = [
        native_outlook.outlook(own, 2.0, 64.0, 2.0, 0.8e-3, begun, books.gallery, books.tally, *cost.arrays)
        for begun in (0.0, 1.0)
    ]
    assert 0 <= beside[0] < beside[1] - 0.2


def hopeful(load: int) -> tuple[Planner, Callable[[], bool]]:
    """A planner whose gallery says that newcomers' drafts pay at this load, where nobody drafts; asks it for one."""
    simulator = Simulator(SMALL, (EASY,), "auto", max_running=1)
    simulator.run([Arrival(0.0, 64, 200, 0)] * 30)
    planner, policy = simulator.planner, make_policy(EngineConfig("m", policy="auto"))
    memory, place = planner.memory, native_following.power(load)
    memory[native_books.BESIDE] = memory[native_books.LOOK_S] = 0.0
    memory[native_books.TRIALS_S + place], memory[native_books.ON_TRIAL + place] = 0.0, 0.0
    memory[native_books.SCOUTS_S] = -1.0  # none of these
    numbers = iter(range(100, 10_000))

    def asks() -> bool:
        comer = newcomer(next(numbers), 20)
        return planner.follows(comer, policy, load, 20) and comer.looks != native_following.LOOKS

    return planner, asks


def put_by(planner: Planner, load: int, rounds: int, followed: int = 0) -> float:
    """Some rounds go by; what may be spent on following whole batches after that, in seconds."""
    memory, tokens, plain_s = planner.memory, float(load), planner.cost.rows_s(load)
    native_following.put_by(float(load), followed, tokens, plain_s, rounds, memory)
    return float(memory[native_books.TRIALS_S + native_following.power(load)])


def test_what_following_may_cost_is_saved_up_for_a_whole_batch() -> None:
    """Blocks cost less together: one newcomer in so many, followed alone, would never be seen to draft."""
    planner, asks = hopeful(2)
    assert not asks(), "nothing is put by"
    waited = 0
    while not asks():
        waited += 1
        assert waited < 1000
        put_by(planner, 2, 50)
    followed = 1
    while asks():
        followed += 1
    assert 2 <= followed <= 8 and put_by(planner, 2, 0) < 0
    planner.memory[native_books.BESIDE] = 1.0
    assert asks(), "others draft with profit"


def test_no_more_than_a_share_of_the_time_is_lost_on_hope() -> None:
    planner, _ = hopeful(8)
    place, plain_s = native_following.power(8), planner.cost.rows_s(8)
    planner.memory[native_books.UNPAID + place] = 0
    assert put_by(planner, 8, 1000) == pytest.approx(native_following.TRIAL_SHARE * 1000 * plain_s)
    planner.memory[native_books.KEEPING_S] = 0.1 * plain_s
    before = put_by(planner, 8, 0)
    assert put_by(planner, 8, 10, followed=3) < before - 0.9 * plain_s, "features that were kept for nothing"
    assert planner.memory[native_books.UNPAID + place] == 8 * 1010
    put_by(planner, 2, 100_000)
    assert planner.memory[native_books.UNPAID + place] == 8 * 1010, "rounds at another load say nothing of this one"
    planner.memory[native_books.UNPAID + place] = 800_000
    before = put_by(planner, 8, 0)
    less = native_following.TRIAL_SHARE * native_following.LEAST * 1000 * plain_s
    assert put_by(planner, 8, 1000) - before == pytest.approx(less), "it has not paid for long"
    assert put_by(planner, 8, 1 << 40) == pytest.approx(native_following.SAVED * plain_s), "nor is more than that saved"


def test_a_stall_is_not_what_keeping_features_takes() -> None:
    """Somebody else had the processor for a second: the debt of it would forbid following anybody for minutes."""
    planner, _ = hopeful(8)
    plain_s = planner.memory[native_books.PLAIN_S] = planner.cost.rows_s(8)
    for _ in range(200):
        planner.following.kept(0.02 * plain_s)
    usual = planner.memory[native_books.KEEPING_S]
    assert 0.02 * plain_s <= usual < 0.1 * plain_s
    planner.following.kept(1.0)
    assert planner.memory[native_books.KEEPING_S] < usual + 0.02 * plain_s


def test_what_drafting_gains_may_go_into_newcomers() -> None:
    planner, _ = hopeful(2)
    memory, plain_s = planner.memory, planner.cost.rows_s(2)
    memory[native_books.UNPAID + 1] = 100_000
    memory[native_books.BESIDE], memory[native_books.PRICE] = 1.0, 1.2 * 2 / plain_s
    assert put_by(planner, 2, 10) >= native_following.WON_SHARE * 0.2 * 10 * plain_s
    assert memory[native_books.UNPAID + 1] == 0


def test_looks_cost_what_they_were_seen_to() -> None:
    """Nothing that a block needs is in the caches where nobody else drafts: a table that is measured warm says less."""
    planner, _ = hopeful(8)
    memory, looked = planner.memory, lambda *took: native_following.looked(*took, planner.memory)
    memory[native_books.PLAIN_S] = 1e-3
    for _ in range(50):
        looked(3e-3, 1.125)
    assert memory[native_books.LOOK_S] == pytest.approx(3e-3 - 1.125e-3, rel=0.02)
    memory[native_books.SCOUTS_S] = 0.0
    assert planner.follows(newcomer(1, 20), make_policy(EngineConfig("m", policy="auto")), 8, 20)
    assert memory[native_books.SCOUTS_S] < -native_following.LOOKS * 1.8e-3
    memory[native_books.BESIDE] = 1.0
    looked(1.0, 1.0)
    assert memory[native_books.LOOK_S] < 2e-3, "others drafted: it says nothing of a look"


def test_who_began_again_and_does_not_draft_is_followed_no_longer() -> None:
    planner, _ = hopeful(1)
    late = newcomer(1, 20)
    planner.returning = late
    assert planner.follows(late, planner.policy, 1, 20)
    planner.books.enter(late, planner.policy)
    late.phase, late.tokens = Phase.DECODE, [0] * 80
    for _ in range(following.REVIEW + 1):
        planner.following.dismiss([late], 1)
    assert not late.followed


def test_who_waits_and_may_enter_counts_as_load(target_dir: Path, drafter_dir: Drafters) -> None:
    """A load that stays the same looks the same, also in rounds between an end and the next beginning."""
    engine = load(target_dir, drafter_dir(), policy="auto", max_running=3)
    loads, number = [], 0
    while number < 12:
        while len(engine.running) + len(engine.waiting) < 4:
            engine.submit(request(str(number), PROMPT[:9], 5 + number % 3))
            number += 1
        engine.step()
        loads.append(engine.scheduler.planner.load)
    assert set(loads[2:]) == {3}


def test_a_newcomers_look_is_paid_for_by_its_own_time() -> None:
    """Which is an eighth of a round's beside seven others, whether these are followed or not."""
    for running, looks in ((1, True), (8, False)):
        simulator = Simulator(SMALL, (HARD,), "auto", max_running=1)
        simulator.run([Arrival(0.0, 64, 100, 0)] * 30)
        planner, policy = simulator.planner, make_policy(EngineConfig("m", policy="auto"))
        planner.memory[native_books.ALLOWANCE_S] = planner.memory[native_books.LOOK_S] = 0.0
        comer = replace(newcomer(1, 65), phase=Phase.DECODE, kv_length=64, absorbed=64, looks=0)
        comer.request = replace(comer.request, end=EndConditions(200))
        planner.who_drafts([comer], 5, 0, policy, running)
        assert (planner._sheet.column(native_sheet.SITTING)[0] == native_gate.PROBE) == looks
