"""Verified lengths as pure functions: against brute force, and without looking ahead where that would bias the text."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from engine.schedule.lengths import (
    Candidate,
    Frame,
    best_budget,
    causal,
    gains_in_order,
    priced,
    top,
)
from engine.schedule.record import Stop
from engine.types import Speculation
from tests.lossless.appendix import FIRST, SECOND, SPEED, TARGET, probability_of_a
from tests.lossless.appendix import causal as causal_by_hand

AUTO = Speculation()


def blocks(generator: random.Random, count: int, gamma: int = 5, free: bool = False) -> list[Candidate]:
    """Candidates with decreasing survivals, random weights, limits and context costs."""
    made = []
    for _ in range(count):
        survival, a = [], 1.0
        for _ in range(gamma):
            a *= generator.random()
            survival.append(a)
        weight = generator.choice([0.5, 1.0, 2.0])
        made.append(
            Candidate(None, generator.randrange(gamma + 1), AUTO, survival, weight, generator.choice([0, 0.01]), free)
        )
    return made


def frame(generator: random.Random, rows: int, kind: str = "convex", price: float = 0.0) -> Frame:
    """A round of about one second whose rows cost more and more, or in stairs."""
    steps = sorted(generator.uniform(0.01, 0.3) for _ in range(rows))
    if kind == "stairs":
        steps = [generator.uniform(0.3, 0.6) if k % 4 == 0 else 0.0 for k in range(rows)]
    return Frame(generator.uniform(1, 4), generator.uniform(0.5, 2), [0.0, *itertools.accumulate(steps)], price)


def profit(candidates: list[Candidate], lengths: tuple[int, ...] | list[int], f: Frame) -> float:
    """Weighted tokens less their seconds at the going price."""
    gain = sum(c.weight * sum(c.survival[:n]) for c, n in zip(candidates, lengths, strict=True))
    own = sum(c.row_s * n for c, n in zip(candidates, lengths, strict=True))
    return gain - f.price * (f.extra(sum(lengths)) + own)


def theta(candidates: list[Candidate], lengths: tuple[int, ...] | list[int], f: Frame) -> float:
    gain = sum(c.weight * sum(c.survival[:n]) for c, n in zip(candidates, lengths, strict=True))
    own = sum(c.row_s * n for c, n in zip(candidates, lengths, strict=True))
    return (f.tokens + gain) / (f.base_s + own + f.extra(sum(lengths)))


def every_choice(candidates: list[Candidate]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(c.limit + 1) for c in candidates))


@pytest.mark.parametrize("seed", range(30))
def test_algorithm_1_finds_the_best_of_all_choices_where_rows_cost_more_and_more(seed: int) -> None:
    """τ grows ever slower and T ever faster, so Θ has one summit and the early stop stands on it."""
    generator = random.Random(seed)
    candidates = [Candidate(None, c.limit, AUTO, c.survival, c.weight) for c in blocks(generator, 3, 4)]
    f = frame(generator, 20)
    best = max(theta(candidates, lengths, f) for lengths in every_choice(candidates))
    assert theta(candidates, causal(candidates, f).lengths, f) == pytest.approx(best)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_the_going_rate_buys_exactly_what_pays(seed: int, free: bool) -> None:
    generator = random.Random(seed)
    candidates = [Candidate(None, c.limit, AUTO, c.survival, c.weight, 0, free) for c in blocks(generator, 3, 4)]
    f = frame(generator, 20, price=generator.uniform(0.5, 3))
    best = max(profit(candidates, lengths, f) for lengths in every_choice(candidates))
    assert profit(candidates, priced(candidates, f).lengths, f) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(30))
def test_free_rows_are_searched_over_stairs(seed: int) -> None:
    generator = random.Random(seed)
    candidates = [Candidate(None, c.limit, AUTO, c.survival, c.weight, 0, True) for c in blocks(generator, 3, 4)]
    f = frame(generator, 20, "stairs", generator.uniform(0.5, 3))
    best = max(profit(candidates, lengths, f) for lengths in every_choice(candidates))
    assert profit(candidates, priced(candidates, f).lengths, f) == pytest.approx(best)


def test_a_stair_is_climbed_when_what_lies_behind_is_expected_to_pay() -> None:
    """The first row costs .9, the next three nothing; its own gain of .8 would not pay, all four together do."""
    stair = Frame(1, 1, [0, 0.9, 0.9, 0.9, 0.9], 1.0, decay=0.9)
    good = Candidate(None, 4, AUTO, [0.8, 0.7, 0.6, 0.5])
    assert priced([good], stair).lengths == [4]
    assert priced([good], Frame(1, 1, stair.extra_s, 1.0, decay=0.05)).lengths == [0]
    assert causal([good], stair).lengths == [0], "Algorithm 1 stops before the stair"


def adapted(choose: object, candidates: list[Candidate], f: Frame, generator: random.Random) -> None:
    """Change what lies behind the first position that was not admitted: nothing may change."""
    lengths = choose(candidates, f)  # type: ignore[operator]
    for _ in range(10):
        changed = []
        for c, n in zip(candidates, lengths, strict=True):
            survival = list(c.survival)
            for k in range(n + 1, len(survival)):
                survival[k] = survival[k - 1] * generator.random()
            changed.append(Candidate(c.confidence, c.limit, AUTO, survival, c.weight, c.row_s, c.free))
        assert choose(changed, f) == lengths  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["convex", "stairs"])
@pytest.mark.parametrize("seed", range(40))
def test_lengths_depend_on_nothing_behind_the_frontier(seed: int, kind: str) -> None:
    """The first refused position is the last whose confidence may have been seen: it does not know its own token."""
    generator = random.Random(seed)
    candidates, f = blocks(generator, 4), frame(generator, 24, kind, generator.uniform(0.5, 3))
    adapted(lambda c, f: causal(c, f).lengths, candidates, f, generator)
    adapted(lambda c, f: priced(c, f).lengths, candidates, f, generator)
    adapted(lambda c, f: top(c, 7).lengths, candidates, f, generator)


@pytest.mark.parametrize("seed", range(10))
def test_free_rows_do_not_move_rejection_rows(seed: int) -> None:
    generator = random.Random(seed)
    careful, f = blocks(generator, 3), frame(generator, 40, "convex", 1.0)
    alone = priced(careful, f).lengths
    assert priced([*careful, *blocks(generator, 3, free=True)], f).lengths[:3] == alone


def test_appendix_a() -> None:
    """The paper's counterexample: with hindsight A comes out with .85; in order, with .70, the target's own."""
    base = float(1 / SPEED[0])
    f = Frame(1.0, base, [float(1 / s) - base for s in SPEED])

    def survival(drafted: str) -> list[float]:
        return [float(FIRST), float(FIRST * SECOND[drafted])]

    def in_order(drafted: str) -> int:
        return causal([Candidate(None, 2, AUTO, survival(drafted))], f).lengths[0]

    def with_hindsight(drafted: str) -> int:
        return best_budget(survival(drafted), f)

    def bought(drafted: str) -> int:
        return priced([Candidate(None, 2, AUTO, survival(drafted))], Frame(1.0, base, f.extra_s, 1.0)).lengths[0]

    assert float(probability_of_a(with_hindsight)) == pytest.approx(0.85)
    assert probability_of_a(in_order) == TARGET["A"] == probability_of_a(bought)
    assert all(in_order(x) == causal_by_hand(x) for x in "AB")


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_goes_to_the_likeliest(seed: int) -> None:
    generator = random.Random(seed)
    candidates = blocks(generator, 5)
    gains = gains_in_order(candidates)
    for budget in range(len(gains) + 2):
        choice = top(candidates, budget)
        taken = [c.weight * a for c, n in zip(candidates, choice.lengths, strict=True) for a in c.survival[:n]]
        assert sorted(taken, reverse=True) == pytest.approx(gains[:budget])
        assert (choice.stop is Stop.EVERYTHING) == (budget >= len(gains))
    f = frame(generator, 30)
    best = max(range(len(gains) + 1), key=lambda k: (f.tokens + sum(gains[:k])) / (f.base_s + f.extra(k)))
    assert best_budget(gains, f) == best


def test_nothing_to_choose_from() -> None:
    f = Frame(1, 1, [0.0], 1.0)
    for choose in (causal, priced):
        assert choose([], f).lengths == []
        assert choose([Candidate(None, 0, AUTO, [])], f).lengths == [0]
    assert top([], 3).lengths == []


def test_deciding_grows_no_faster_than_n_log_n() -> None:
    """4,096 requests of seven tokens; the bound allows for a busy machine and excludes anything quadratic."""
    generator = random.Random(0)
    seconds = []
    for count in (512, 4096):
        candidates = blocks(generator, count, 7)
        f = Frame(count, 1.0, [0.0] * (7 * count + 1), 1.0)
        tries = []
        for _ in range(5):
            began = time.process_time()
            priced(candidates, f), causal(candidates, f)
            tries.append(time.process_time() - began)
        seconds.append(min(tries))
    assert seconds[1] < 8 * 2.5 * seconds[0]
