"""The storms of the ordinary path, with rounds that stay on the device whenever those who run let them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.device_rounds.rounds import DeviceRounds
from engine.engine import Engine
from engine.types import Request, Sampling, Speculation, SpeculationMode, TokenDelta
from tests.engine import test_storms as ordinary
from tests.engine.device_rounds.helpers import load
from tests.engine.helpers import PAGE_BYTES, request

Drafters = Callable[..., Path]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Storms on engines with device rounds; which of their rounds were such."""
    went: list[bool] = []
    step = DeviceRounds.step

    def watched(self: DeviceRounds) -> tuple[list[TokenDelta], bool]:
        found = step(self)
        went.append(found[1])
        return found

    monkeypatch.setattr(ordinary, "load", load)
    monkeypatch.setattr(DeviceRounds, "step", watched)
    return went


def easy_request(generator: random.Random, name: str) -> Request:
    """One that may stay on the device."""
    prompt = [(7 * i) % ordinary.VOCAB for i in range(generator.choice((0, 0, 16, 33)))]
    prompt += [generator.randrange(ordinary.VOCAB) for _ in range(generator.randrange(1, 30))]
    sampling = Sampling(
        temperature=generator.choice((0.0, 0.7, 1.0)),
        top_k=generator.choice((0, 5)),
        top_p=generator.choice((1.0, 0.8)),
        seed=generator.choice((None, generator.getrandbits(64))),
    )
    mode = generator.choice(list(SpeculationMode))
    speculation = Speculation(mode, generator.choice((None, 2)), max_draft_tokens=generator.choice((None, 3)))
    stop = generator.sample(range(ordinary.VOCAB), generator.choice((0, 2)))
    priority = generator.choice((0, 0, 1))
    return request(name, prompt, generator.randrange(1, 40), sampling, speculation, stop_ids=stop, priority=priority)


@pytest.mark.parametrize("seed", range(6))
def test_storm(
    seed: int, target_dir: Path, drafter_dir: Drafters, launched: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that may stay on the device come and go; every second storm has others among them."""
    if seed % 2 == 0:
        monkeypatch.setattr(ordinary, "random_request", easy_request)
    policy = ("auto", "relayed", "fixed")[seed % 3]
    engines: list[Engine] = []

    def loaded(*args: Any, **options: Any) -> Engine:
        engines.append(load(*args, **options))
        return engines[-1]

    monkeypatch.setattr(ordinary, "load", loaded)
    ordinary.storm(seed, target_dir, drafter_dir(head=("vanilla", "rnn")[seed % 2]), PAGE_BYTES, policy=policy)
    assert 5 < sum(launched) < len(launched), "the storm was meant to go back and forth"
    records = engines[0].history.last()
    assert all(len(record.requests) <= record.running for record in records)
    for old, new in pairwise(records):
        assert new.round == old.round + 1
    assert not engines[0].scheduler.planner.following._scouts, "who has ended is forgotten"


def test_texts_in_a_storm_are_the_texts_in_calm(
    target_dir: Path,
    drafter_dir: Drafters,
    launched: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pages run out, sequences are preempted, beginnings are shared: texts are those of plain decoding, alone."""
    from tests.engine import helpers

    monkeypatch.setattr(ordinary, "random_request", easy_request)
    generator = random.Random(5)
    todo = [easy_request(generator, str(i)) for i in range(40)]
    todo = [one for one in todo if one.sampling.temperature == 0 or one.sampling.seed is not None]
    stormy = load(target_dir, drafter_dir(), kv_memory=9 * PAGE_BYTES, max_model_len=ordinary.LIMIT, policy="fixed")
    calm = helpers.load(target_dir, max_model_len=ordinary.LIMIT, max_running=1, prefix_cache=False)
    found, expected = helpers.run(stormy, todo), helpers.run(calm, todo)
    assert {n: r.tokens for n, r in found.items()} == {n: r.tokens for n, r in expected.items()}
    assert sum(launched) > 20
