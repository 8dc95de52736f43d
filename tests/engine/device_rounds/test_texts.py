"""Texts of rounds that stay on the device are those of rounds that the host runs, whatever happens around them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.types import Request
from tests.engine import helpers
from tests.engine.device_rounds.helpers import load, rounds_of
from tests.engine.helpers import GREEDY, Result, coupled, request, run

Drafters = Callable[..., Path]
VOCAB = 96
POLICIES = ("auto", "relayed", "fixed", "threshold", "plain")


def requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy and seeded requests with prompts and answers of many lengths."""
    generator = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 40))]
        filters = {"top_k": generator.choice((0, 7)), "top_p": generator.choice((1.0, 0.8))}
        sampling = coupled(i, generator.choice((0.7, 1.0)), **filters) if i % 2 else GREEDY
        stop = generator.sample(range(VOCAB), 3 if i % 3 == 0 else 0)
        found.append(request(f"r{i}", prompt, generator.randrange(1, 60), sampling, stop_ids=stop))
    return found


def texts(results: dict[str, Result]) -> dict[str, tuple[list[int], object]]:
    return {name: (result.tokens, result.finish) for name, result in results.items()}


@pytest.fixture(scope="module")
def calm(target_dir: Path) -> dict[str, tuple[list[int], object]]:
    """What plain rounds of the host write."""
    return texts(run(helpers.load(target_dir), requests(24)))


@pytest.mark.parametrize("policy", POLICIES)
def test_texts_are_those_of_the_ordinary_path(
    policy: str, target_dir: Path, drafter_dir: Drafters, calm: dict[str, tuple[list[int], object]]
) -> None:
    engine = load(target_dir, drafter_dir(), policy=policy, max_running=10)
    assert texts(run(engine, requests(24))) == calm
    assert rounds_of(engine).seating.launched > 10
