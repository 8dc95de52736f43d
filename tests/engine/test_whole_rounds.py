"""Rounds that native code runs in one piece (kernels.draft_pass, target_pass, context_pass) are the ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.drafters.dspark import DSparkDrafter
from engine.engine import Engine
from engine.types import DraftBlock, LaidOut, Request, Sampling, StepPlan, Verdict
from tests.engine.helpers import GREEDY, Result, coupled, load, rejection, request, run

Drafters = Callable[..., Path]
SAMPLINGS = (
    GREEDY,
    coupled(3),
    coupled(5, 0.7, top_p=0.9),
    Sampling(seed=7),
    Sampling(temperature=0.8, top_k=9, seed=8),
)


def piece_by_piece(engine: Engine) -> Engine:
    """The same engine, each step of a round by itself."""
    engine.target.forward = engine.target.forward  # type: ignore[method-assign]  # somebody stands in between
    if engine.drafter is not None:
        assert isinstance(engine.drafter, DSparkDrafter)
        engine.drafter.whole = engine.drafter.absorbs = None
    return engine


def count_whole(engine: Engine) -> list[bool]:
    """Of every round to come, whether native code ran it in one piece."""
    found: list[bool] = []
    verify = engine.verifier.run

    def watched(plan: StepPlan, block: DraftBlock | None) -> Verdict:
        verdict = verify(plan, block)
        found.append(isinstance(verdict.rows, LaidOut))
        return verdict

    engine.verifier.run = watched  # type: ignore[method-assign]
    return found


def requests(count: int) -> list[Request]:
    """Of different prompts, lengths and ways to sample; seeded, so that their texts are what they are."""
    choose = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        prompt = torch.randint(96, (3 + 17 * (number % 4),), generator=choose).tolist()
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        how = rejection() if sampling.temperature and number % 2 else None
        found.append(request(f"{number}", prompt, 12 + 9 * (number % 3), sampling, how))
    return found


def texts(results: dict[str, Result]) -> dict[str, list[int]]:
    return {name: result.tokens for name, result in results.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["plain", "fixed", "threshold"])
@pytest.mark.parametrize("count", [1, 7])
def test_the_same_texts(target_dir: Path, drafter_dir: Drafters, dtype: str, policy: str, count: int) -> None:
    options: dict[str, Any] = {"policy": policy, "dtype": dtype, "max_running": 5, "lookup": False}
    whole, apart = (load(target_dir, drafter_dir(), **options) for _ in range(2))
    rounds, others = count_whole(whole), count_whole(piece_by_piece(apart))
    assert texts(run(whole, requests(count))) == texts(run(apart, requests(count)))
    assert sum(rounds) > len(rounds) / 3 and not any(others)


@pytest.mark.parametrize("head", ["none", "vanilla", "gated", "rnn"])
def test_every_head(target_dir: Path, drafter_dir: Drafters, head: str) -> None:
    directory = drafter_dir(head=head, confidence=head != "none")
    whole, apart = (load(target_dir, directory, policy="fixed") for _ in range(2))
    assert texts(run(whole, requests(5))) == texts(run(piece_by_piece(apart), requests(5)))


def test_without_a_drafter_and_with_copies(target_dir: Path, drafter_dir: Drafters) -> None:
    repeats = [request(f"{n}", [5, 6, 7, 8, 9, 10, 11, 12] * 6, 40) for n in range(3)]
    alone = load(target_dir)
    rounds = count_whole(alone)
    expected = texts(run(alone, repeats))
    assert any(rounds)
    whole, apart = (load(target_dir, drafter_dir(), policy="auto") for _ in range(2))
    assert texts(run(whole, repeats)) == texts(run(piece_by_piece(apart), repeats)) == expected


def test_what_was_prepared_is_prepared_anew_where_its_memory_has_moved(target_dir: Path, drafter_dir: Drafters) -> None:
    """A longer round in between takes larger scratch; other shapes push each other out."""
    engine, fresh = (load(target_dir, drafter_dir(), policy="fixed", kv_memory=16 * 2**20) for _ in range(2))
    short = request("short", [1, 2, 3], 20)
    before = texts(run(engine, [short]))
    run(engine, [request(f"{n}", list(range(90)), 30, coupled(n)) for n in range(12)])
    for count in range(2, 9):
        run(engine, requests(count))
    assert texts(run(engine, [short])) == before == texts(run(fresh, [short]))


def test_a_page_that_does_not_exist_is_refused(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed")
    engine.submit(request("a", range(20), 30))
    for _ in range(3):
        engine.step()
    page, engine.running[0].pages[0] = engine.running[0].pages[0], 1 << 20
    with pytest.raises(ValueError, match="page table"):
        engine.step()
    engine.running[0].pages[0] = page
    engine.reset()
    engine.check()
