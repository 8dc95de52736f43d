"""Pages of layers with a window: given back as they leave it, found again by prefixes, never read once gone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM

from engine.config import PAGE_SIZE
from engine.engine import Engine
from engine.loading import load_engine
from engine.page_groups import PageGroups
from engine.pages import PagePool
from engine.types import EndConditions, Request, Sequence, Verification
from engine.windows import GONE, WindowPages, most_held
from tests.engine.gemma import make_gemma, save_gemma_drafter
from tests.engine.helpers import FIXED, OFF, coupled, generate, load, request, run

WINDOW = 20
LONG = tuple(torch.randint(2, 96, (150,), generator=torch.Generator().manual_seed(8)).tolist())


@pytest.fixture(scope="module")
def gemma() -> Gemma3ForCausalLM:
    return make_gemma(window=WINDOW)


@pytest.fixture(scope="module")
def gemma_dir(gemma: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma")
    gemma.save_pretrained(directory)
    return directory


def poison(engine: Engine) -> None:
    """From now on, every page of layers with a window that nobody holds and no prefix needs is NaN in each round."""
    assert engine.windows is not None
    pool, step = engine.windows.pool, engine.verifier.run

    def poisoned(*arguments: object) -> object:
        unused = [page for page in range(pool.total) if not pool._holders[page] and page not in pool._idle]
        for layer, cache in zip(engine.target.layers, engine.target.caches, strict=True):
            if layer.window:
                cache.k[unused] = cache.v[unused] = torch.nan
        return step(*arguments)  # type: ignore[arg-type]

    engine.verifier.run = poisoned  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("drafter", [None, "vanilla", "eagle3"])
def test_what_has_left_is_never_read(
    drafter: str | None, gemma: Gemma3ForCausalLM, gemma_dir: Path, tmp_path: Path
) -> None:
    draft = None if drafter is None else save_gemma_drafter(tmp_path, gemma, drafter)
    prompts = [LONG, LONG[:70], LONG[3:40], LONG[:5]]
    expected = [generate(gemma, prompt, 60) for prompt in prompts]
    requests = [request(str(i), prompt, 60, speculation=FIXED) for i, prompt in enumerate(prompts)]
    for cache in (False, True):
        engine = load(gemma_dir, draft, policy="fixed", prefill_chunk=11, prefix_cache=cache)
        poison(engine)
        for _ in range(2):
            results = run(engine, requests)
            assert [results[str(i)].tokens for i in range(len(prompts))] == expected
        assert results["0"].cached == (144 if cache else 0)


def test_plain_torch_does_not_read_it_either(gemma_dir: Path) -> None:
    texts = []
    for poisons in (False, True):
        engine = load(gemma_dir, dtype="float16", prefill_chunk=11, prefix_cache=False)
        if poisons:
            poison(engine)
        texts.append(run(engine, [request("a", LONG, 40), request("b", LONG[:30], 40)]))
    assert texts[0]["a"].tokens == texts[1]["a"].tokens and texts[0]["b"].tokens == texts[1]["b"].tokens


def test_a_sequence_holds_its_window_alone(gemma_dir: Path) -> None:
    engine = load(gemma_dir)
    assert engine.windows is not None
    engine.submit(request("a", LONG, 80))
    while engine.has_work:
        engine.step()
        engine.check()
        for sequence in engine.running:
            assert len(engine.windows.held(sequence)) <= most_held(WINDOW, 0)
            assert len(sequence.pages) >= sequence.kv_length // PAGE_SIZE
    assert engine.windows.pool.available == engine.windows.pool.total


def test_layers_with_a_window_take_no_more_than_they_need(gemma_dir: Path) -> None:
    """Three of the four layers have a window: memory for one page of each is memory for four of the last one."""
    budget = {"kv_memory": 2**20, "max_batch_tokens": 80, "max_running": 2, "max_model_len": None}
    engine = load(gemma_dir, **budget)
    assert engine.windows is not None
    assert engine.windows.pool.total == 2 * most_held(WINDOW, 0) + 5
    sizes = [cache.k.nbytes + cache.v.nbytes for cache in engine.target.caches]
    assert sum(sizes) <= 2**20
    assert engine.pool.total == 2 * 512 // PAGE_SIZE, "nobody can use more"
    assert [cache.pages for cache in engine.target.caches] == [11, 11, 64, 11]


def test_a_small_pool_delays_and_recomputes_but_changes_no_text(gemma: Gemma3ForCausalLM, gemma_dir: Path) -> None:
    """More requests than windows: they wait, are preempted, find what is left of their prefixes, and say the same."""
    engine = load(gemma_dir, kv_memory=13 * 32_768, max_batch_tokens=80, max_running=8, max_model_len=200)
    poison(engine)
    generator = random.Random(1)
    prompts = [LONG[: generator.randrange(1, 150)] for _ in range(12)]
    results = run(engine, [request(str(i), prompt, 30) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert results[str(i)].tokens == generate(gemma, prompt, 30)


def test_seeded_texts_do_not_depend_on_prefixes(gemma_dir: Path) -> None:
    alone = run(load(gemma_dir, prefix_cache=False), [request("a", LONG[:90], 30, coupled(3))])["a"].tokens
    engine = load(gemma_dir, kv_memory=2**19, max_batch_tokens=80, max_running=4)
    for number in range(6):
        run(engine, [request(f"other {number}", LONG[number : 60 + 15 * number], 20, speculation=OFF)])
        assert run(engine, [request("a", LONG[:90], 30, coupled(3))])["a"].tokens == alone


def _sequence(length: int) -> Sequence:
    return Sequence(Request("a", (0,), EndConditions(1)), 0, Verification.REJECTION, [0] * length, 0, kv_length=length)


@pytest.mark.parametrize("window", [1, 16, 17, 20, 33])
def test_exactly_the_pages_that_no_row_sees_leave(window: int) -> None:
    pool = PagePool(64)
    windows = WindowPages(pool, window)
    sequence = _sequence(0)
    for length in range(1, 200):
        while len(sequence.window_pages) * PAGE_SIZE < length + 1:
            sequence.window_pages += pool.allocate(1) or []
        sequence.kv_length = length
        windows.leave(sequence)
        seen = {position // PAGE_SIZE for position in range(max(0, length - window + 1), length + 1)}
        assert {page for page in range(len(sequence.window_pages)) if page >= sequence.window_start} == seen
        pool.check([windows.held(sequence)])
    windows.drop(sequence)
    assert pool.available == pool.total


def test_a_prefix_serves_where_its_last_window_is_there() -> None:
    pool = PagePool(32)
    windows = WindowPages(pool, 40)  # behind n pages: the last three, or what there is
    hashes = [bytes([n]) * 16 for n in range(10)]
    pages = pool.allocate(10) or []
    for n in (0, 1, 4, 5, 6, 7, 9):
        pool.publish(pages[n], hashes[n])
    assert [windows.reusable(hashes, most) for most in range(11)] == [0, 1, 2, 2, 2, 2, 2, 7, 8, 8, 8]
    pool.release(pages)
    sequence = _sequence(0)
    windows.acquire(sequence, hashes[:8])
    assert sequence.window_pages == [GONE] * 5 + pages[5:8] and sequence.window_start == 5
    pool.check([windows.held(sequence)])


def test_a_newcomer_needs_its_window_and_a_chunk() -> None:
    """Of a prompt of 100 tokens behind a window of 40 its last four pages, and those of one chunk while it is read."""
    pages = PageGroups(PagePool(64), WindowPages(PagePool(8), 40))
    assert [pages.fits(100, 0, 3, chunk) for chunk in (16, 64, 65)] == [True, True, False]
    assert not PageGroups(PagePool(9)).fits(100, 0, 3, 64) and PageGroups(PagePool(9)).fits(100, 1, 3, 64)
    sequence = _sequence(0)
    assert pages.grow(sequence, 100) and len(sequence.pages) == len(sequence.window_pages) == 7
    assert not pages.grow(sequence, 130) and len(sequence.pages) == 7  # two more are not there
    pages.check([sequence])
    pages.give_back(sequence)
    pages.check([])
    assert pages.whole.available == 64 and not sequence.pages and not sequence.window_pages


def test_a_pool_without_windows_is_as_before(target_dir: Path) -> None:
    engine: Engine = load(target_dir)
    assert engine.windows is None
    check: Callable[[], None] = engine.check
    run(engine, [request("a", LONG[:20], 5)])
    check()
    assert load_engine(engine.config).windows is None
