"""Eagle3 and MTP-1: logits and tokens equal their equations, wherever the context came from, and pages tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.engine import Engine
from engine.prefix_cache import page_hash, root_hash
from engine.types import DraftBlock, Sampling, Sequence, Speculation, SpeculationMode
from tests.engine.helpers import FIXED, GREEDY, OFF, Result, collect, coupled, generate, load, rejection, request, run
from tests.engine.lookahead import LookAheadOracle, save_eagle3, save_mtp
from tests.engine.test_drafter import MIX, Judge
from tests.engine.test_prefix_cache import poison

FEW_IDS = (3, 90, 0, 41, 42, 7, 66, 12, 95, 30, 31, 55, 54, 20, 77, 81)  # no order: d2t need not increase
KINDS: dict[str, Callable[..., Path]] = {
    "eagle3": save_eagle3,
    "eagle3, deep": lambda *a: save_eagle3(*a, block=3, layers=2, feature_layers=(-1, 1, 2), copies=True),
    "eagle3, few ids": lambda *a: save_eagle3(*a, draft_ids=FEW_IDS, copies=True),
    "eagle3, rows of the head": lambda *a: save_eagle3(*a, draft_ids=FEW_IDS, own_head=False),
    "mtp": save_mtp,
    "mtp, re-fed": lambda *a: save_mtp(*a, block=4, copies=True),
}
TWO = ("eagle3", "mtp, re-fed")


@pytest.fixture(scope="module", params=KINDS)
def drafter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hf_target: Qwen3ForCausalLM
) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("drafter"), hf_target)


two_kinds = pytest.mark.parametrize("drafter", TWO, indirect=True)


class LookAheadJudge(Judge):
    """Blocks are drafted as far as their sequences' pages reach."""

    def __init__(self, engine: Engine, directory: Path, target: Qwen3ForCausalLM, every: int = 1) -> None:
        super().__init__(engine, LookAheadOracle(directory, target), every)
        self.short = 0

    def __call__(self, sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        block = super().__call__(sequences, length)
        self.short += sum(self.drafted(sequence, block) < block.tokens.shape[1] for sequence in sequences)
        return block

    def drafted(self, sequence: Sequence, block: DraftBlock) -> int:
        return min(len(sequence.pages) * 16 - sequence.kv_length + 1, int(block.tokens.shape[1]))


def test_every_format(
    drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path, prompts: list[tuple[int, ...]]
) -> None:
    """A mixed batch: greedy, coupled and rejection rows, prompts of many lengths in chunks, some sitting out."""
    engine = load(target_dir, drafter, policy="fixed", prefill_chunk=11)
    judge = LookAheadJudge(engine, drafter, hf_target)
    assert (engine.info.head, engine.info.has_confidence) == ("none", False)
    assert (engine.info.drafter, engine.info.block_size) == (engine.drafter.kind, judge.oracle.gamma)
    results = run(engine, [request(str(i), p, 10, *MIX[i % len(MIX)]) for i, p in enumerate(prompts)])
    assert judge.judged >= 8
    assert max(judge.positions) > 48
    greedy = [i for i in range(len(prompts)) if MIX[i % len(MIX)][0] == GREEDY]
    for i in greedy:
        assert results[str(i)].tokens == generate(hf_target, prompts[i], 10)


@two_kinds
def test_long_context(drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    engine = load(target_dir, drafter, policy="fixed", max_model_len=512, prefill_chunk=37, kv_memory=8 * 2**20)
    judge = LookAheadJudge(engine, drafter, hf_target, every=3)
    prompt = torch.randint(96, (440,), generator=torch.Generator().manual_seed(4)).tolist()
    run(engine, [request("long", prompt, 50, Sampling(seed=1)), request("short", prompt[:3], 8, Sampling(seed=2))])
    assert judge.judged >= 5
    assert max(judge.positions) > 470


@two_kinds
def test_after_prefix_cache_hits(drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    """Cached pages hold the drafter's rows too, generated ones included."""
    engine = load(target_dir, drafter, policy="fixed")
    prompt = torch.randint(96, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    first = run(engine, [request("first", prompt, 30, Sampling(seed=3))])["first"]
    judge = LookAheadJudge(engine, drafter, hf_target)
    again = [*prompt, *first.tokens, 5, 6]
    results = run(
        engine, [request("second", again, 16, Sampling(seed=4)), request("third", again[:35], 16, Sampling(seed=5))]
    )
    assert results["second"].cached == 64
    assert results["third"].cached == 32
    assert judge.judged >= 4


@two_kinds
def test_the_token_after_a_page_belongs_to_it(drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    """Two prompts share two pages, but not the token after the second: only the first page is shared."""
    engine = load(target_dir, drafter, policy="fixed")
    common = torch.randint(96, (32,), generator=torch.Generator().manual_seed(9)).tolist()
    one, other = [*common, 10, 1, 2], [*common, 11, 1, 2]
    run(engine, [request("one", one, 4)])
    page = page_hash(root_hash(""), common[:17])
    wanted = page_hash(page, [*common[16:], 10])
    cached = [engine.pool.lookup(page_hash(page, [*common[16:], token])) for token in (10, 11)]
    assert cached[0] == engine.pool.lookup(wanted)
    assert cached[1] is None
    engine.pool.release([cached[0], cached[0]])
    judge = LookAheadJudge(engine, drafter, hf_target)
    results = run(engine, [request("other", other, 8), request("again", [*one, 3], 8)])
    assert results["other"].cached == 16
    assert results["again"].cached == 32
    assert judge.judged >= 4


def test_drafters_that_do_not_look_ahead_share_such_pages(target_dir: Path, drafter_dir: Callable[..., Path]) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed")
    common = list(range(32))
    run(engine, [request("one", [*common, 10], 4)])
    assert run(engine, [request("other", [*common, 11], 4)])["other"].cached == 32


@two_kinds
def test_after_preemption(
    drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path, prompts: list[tuple[int, ...]]
) -> None:
    roomy = load(target_dir, drafter)
    page = 32_768 + roomy.drafter.page_bytes
    engine = load(target_dir, drafter, policy="fixed", kv_memory=14 * page, max_model_len=96)
    judge = LookAheadJudge(engine, drafter, hf_target, every=2)
    preempted: set[str] = set()
    propose = engine.scheduler.choose_drafting

    def watch(running: list[Sequence], waiting: list[Sequence]) -> tuple[Sequence, ...]:
        preempted.update(s.request.request_id for s in running if s.preemptions)
        return propose(running, waiting)

    engine.scheduler.choose_drafting = watch  # type: ignore[method-assign]
    run(engine, [request(str(i), p, 24, *MIX[i % 3]) for i, p in enumerate(prompts)])
    assert preempted, "the pool was meant to run out"
    assert judge.judged >= 8


@two_kinds
def test_blocks_end_where_pages_end(drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    """Where fewer tokens can be verified than a block holds, pages may stop inside the block."""
    capped = Speculation(SpeculationMode.FIXED, max_draft_tokens=1)
    engine = load(target_dir, drafter, policy="fixed", max_model_len=64)
    judge = LookAheadJudge(engine, drafter, hf_target)
    todo = []
    for i in range(9):
        prompt = torch.randint(96, (40 + i,), generator=torch.Generator().manual_seed(i)).tolist()
        sampling, speculation = ((GREEDY, capped), (coupled(i), capped), (Sampling(seed=i), rejection()))[i % 3]
        todo.append(request(str(i), prompt, 40, sampling, speculation))
    results = run(engine, todo)
    assert judge.short, "no block was cut short"
    plain = run(load(target_dir, max_model_len=64), todo)
    for i, one in enumerate(todo):
        assert len(results[str(i)].tokens) == 64 - len(one.prompt)
        if i % 3 < 2:
            assert results[str(i)].tokens == plain[str(i)].tokens


@two_kinds
def test_a_hole_in_the_context_is_noticed(drafter: Path, target_dir: Path) -> None:
    for broken in ("propose", "absorb"):
        engine = load(target_dir, drafter, policy="plain" if broken == "absorb" else "fixed")
        engine.scheduler.planner.follows = lambda *_: True  # type: ignore[method-assign]
        engine.submit(request("a", range(20), 10))
        engine.step()
        engine.running[0].absorbed -= 1
        if broken == "absorb":  # nothing is absorbed before somebody drafts
            engine.step()
            engine.update_policy({"policy": "fixed"})
        with pytest.raises(AssertionError, match="holes"):
            engine.step()


@two_kinds
def test_reused_pages_may_hold_nan(
    drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path, prompts: list[tuple[int, ...]]
) -> None:
    engine = load(target_dir, drafter, kv_memory=2**20, policy="fixed")
    states = engine.drafter.states.view(engine.pool.total, 16, -1)

    def spoil() -> None:
        poison(engine)
        states[engine.pool._free] = torch.nan

    results: dict[str, Result] = {}
    judge = LookAheadJudge(engine, drafter, hf_target, every=4)
    spoil()
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, 18, GREEDY if i % 2 else coupled(i), OFF if i % 5 == 4 else FIXED))
        collect(results, engine.step())
        spoil()
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
        spoil()
    assert judge.judged >= 5
    for i, prompt in enumerate(prompts):
        assert not any(delta.error for delta in results[str(i)].deltas)
        if i % 2:
            assert results[str(i)].tokens == generate(hf_target, prompt, 18)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_sixteen_bits(dtype: str, drafter: Path, hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    """Whatever a rounded drafter proposes, greedy text is the target's own."""
    drafted = run(load(target_dir, drafter, dtype=dtype, policy="fixed"), [request("a", range(30), 12)])["a"]
    plain = run(load(target_dir, dtype=dtype), [request("a", range(30), 12)])["a"]
    assert drafted.tokens == plain.tokens
