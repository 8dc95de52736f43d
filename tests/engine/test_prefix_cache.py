"""The prefix cache in the engine: hits change nothing but the work, and reused pages may hold anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.engine import Engine
from engine.types import Sampling, Speculation
from tests.engine.helpers import FIXED, GREEDY, OFF, Result, collect, generate, load, request, run

Drafters = Callable[..., Path]
PROMPT = tuple(torch.randint(96, (53,), generator=torch.Generator().manual_seed(1)).tolist())


def test_a_hit_gives_the_same_text(hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed")
    expected = generate(hf_target, PROMPT, 20)
    first = run(engine, [request("a", PROMPT, 20)])["a"]
    second = run(engine, [request("b", PROMPT, 20)])["b"]
    assert (first.cached, second.cached) == (0, 48)
    assert first.tokens == second.tokens == expected


def test_generated_pages_are_found_too(target_dir: Path, drafter_dir: Drafters) -> None:
    """The next turn of a chat starts from the last answer. Its last token is not in the caches yet."""
    engine = load(target_dir, drafter_dir(), policy="fixed")
    first = run(engine, [request("a", PROMPT, 28)])["a"]
    assert len(PROMPT) + len(first.tokens) == 81
    assert run(engine, [request("b", [*PROMPT, *first.tokens, 1], 4)])["b"].cached == 80


def test_salts_do_not_share(target_dir: Path) -> None:
    engine = load(target_dir)
    run(engine, [request("a", PROMPT, 4, cache_salt="x")])
    assert run(engine, [request("b", PROMPT, 4, cache_salt="y")])["b"].cached == 0
    assert run(engine, [request("c", PROMPT, 4, cache_salt="x")])["c"].cached == 48


def test_switched_off(target_dir: Path) -> None:
    engine = load(target_dir, prefix_cache=False)
    run(engine, [request("a", PROMPT, 4)])
    assert run(engine, [request("b", PROMPT, 4)])["b"].cached == 0
    assert engine.stats().pages_cached == 0


def test_shared_while_running(hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters) -> None:
    """A page with two holders is written by neither: both texts stay right."""
    engine = load(target_dir, drafter_dir(), policy="fixed")
    results: dict[str, Result] = {}
    for name, tail in (("a", 3), ("b", 4), ("c", 3)):
        engine.submit(request(name, (*PROMPT, tail), 20))
        for _ in range(3):
            collect(results, engine.step())
            engine.check()
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
    assert results["b"].cached == results["c"].cached == 48
    for name, tail in (("a", 3), ("b", 4), ("c", 3)):
        assert results[name].tokens == generate(hf_target, (*PROMPT, tail), 20)


def test_rejected_drafts_do_not_enter(hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters) -> None:
    """Pages fill up with rejected tokens past the last committed one; what is found later must not be those."""
    engine = load(target_dir, drafter_dir(), policy="fixed")
    for length in range(40, 56, 5):
        expected = generate(hf_target, PROMPT[:length], 30)
        assert run(engine, [request("a", PROMPT[:length], 30)])["a"].tokens == expected
    more = [*PROMPT[:40], *generate(hf_target, PROMPT[:40], 30)]
    again = run(engine, [request("b", more, 10)])["b"]
    assert again.cached == 64
    assert again.tokens == generate(hf_target, more, 10)


def poison(engine: Engine) -> None:
    """Fill every page that nobody holds and nobody may find with NaN."""
    free = torch.tensor(engine.pool._free, dtype=torch.int64)
    caches = list(engine.target.caches)
    if engine.drafter is not None:
        caches += engine.drafter.caches  # type: ignore[attr-defined]
    for cache in caches:
        cache.k[free] = torch.nan
        cache.v[free] = torch.nan


@pytest.mark.parametrize("speculation", [OFF, FIXED], ids=["plain", "drafted"])
def test_reused_pages_may_hold_nan(
    speculation: Speculation,
    hf_target: Qwen3ForCausalLM,
    target_dir: Path,
    drafter_dir: Drafters,
    prompts: list[tuple[int, ...]],
) -> None:
    """Freed pages are poisoned between rounds, and with them every slot that a new holder has not written yet."""
    engine = load(target_dir, drafter_dir(), kv_memory=2**20, policy="fixed")
    results: dict[str, Result] = {}
    poison(engine)
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, 18, GREEDY if i % 2 else Sampling(seed=i), speculation))
        collect(results, engine.step())
        poison(engine)
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
        poison(engine)
    for i, prompt in enumerate(prompts):
        assert not any(delta.error for delta in results[str(i)].deltas)
        if i % 2:
            assert results[str(i)].tokens == generate(hf_target, prompt, 18)
    clean = run(load(target_dir), [request(str(i), p, 18, Sampling(seed=i)) for i, p in enumerate(prompts)])
    for i in range(0, len(prompts), 2):
        assert results[str(i)].tokens == clean[str(i)].tokens
