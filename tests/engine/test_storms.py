"""Storms: random requests, cancellations and preemptions, proven after every round, everything free at the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

from engine import lookup
from engine.engine import Engine
from engine.errors import QueueFull
from engine.types import DraftBlock, Request, Sampling, Sequence, Speculation, SpeculationMode, Verification
from tests.engine.helpers import PAGE_BYTES, Result, collect, load, request, run
from tests.engine.lookahead import save_eagle3, save_mtp

Drafters = Callable[..., Path]
VOCAB, LIMIT = 96, 80


def random_request(generator: random.Random, name: str) -> Request:
    """Any valid request; half of the prompts share a beginning."""
    prompt = [(7 * i) % VOCAB for i in range(generator.choice((0, 0, 16, 33)))]
    prompt += [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 30))]
    sampling = Sampling(
        temperature=generator.choice((0.0, 0.7, 1.0)),
        top_k=generator.choice((0, 5)),
        top_p=generator.choice((1.0, 0.8)),
        repetition_penalty=generator.choice((1.0, 1.2)),
        frequency_penalty=generator.choice((0.0, 0.3)),
        seed=generator.choice((None, generator.getrandbits(64))),
    )
    speculation = Speculation(
        generator.choice(list(SpeculationMode)),
        draft_tokens=generator.choice((None, 2)),
        max_draft_tokens=generator.choice((None, 3)),
        verification=generator.choice((None, *Verification)),
    )
    return request(
        name,
        prompt,
        generator.randrange(1, 40),
        sampling,
        speculation,
        stop_ids=generator.sample(range(VOCAB), generator.choice((0, 2))),
        logprobs=generator.choice((None, None, 2)),
        priority=generator.choice((0, 0, 1)),
        cache_salt=generator.choice(("", "other")),
    )


@pytest.mark.parametrize("seed", range(4))
def test_storm(seed: int, target_dir: Path, drafter_dir: Drafters) -> None:
    storm(seed, target_dir, drafter_dir(head=("vanilla", "gated", "rnn", "none")[seed]), PAGE_BYTES)


@pytest.mark.parametrize("seed", [7, 8, 13, 14])
def test_storm_of_drafters_that_look_ahead(
    seed: int, target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    save = save_eagle3 if seed % 2 else save_mtp
    directory = save(tmp_path, hf_target, block=1 + seed % 4)
    storm(seed, target_dir, directory, page_bytes(target_dir, directory))


@pytest.mark.parametrize("seed", [21, 22])
def test_storm_of_copies(seed: int, target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch) -> None:
    """What followed the same token is copied wherever that may pay; most of it is wrong."""
    monkeypatch.setattr(lookup, "WIDTH", 1)
    storm(seed, target_dir, drafter_dir(), PAGE_BYTES, policy="auto")


def page_bytes(target_dir: Path, directory: Path) -> int:
    """What one page takes in the caches of the tiny target and of a drafter."""
    drafter = load(target_dir, directory).drafter
    assert drafter is not None
    return 32_768 + drafter.page_bytes


def storm(seed: int, target_dir: Path, directory: Path, page: int, policy: str | None = None) -> None:
    generator = random.Random(seed)
    engine = load(
        target_dir,
        directory,
        kv_memory=generator.choice((6, 9, 15)) * page,
        max_model_len=LIMIT,
        max_running=generator.choice((3, 8)),
        prefill_chunk=generator.choice((3, 16)),
        max_queue=6,
        prefix_cache=bool(seed % 3),
        policy=policy or generator.choice(("fixed", "threshold")),
    )
    watch_proposals(engine)
    results: dict[str, Result] = {}
    requests: dict[str, Request] = {}
    cancelled: set[str] = set()
    refused = preempted = 0
    for step in range(220):
        if step < 150 and generator.random() < 0.5:
            one = random_request(generator, f"r{step}")
            try:
                engine.submit(one)
                requests[one.request_id] = one
            except QueueFull:
                refused += 1
        if generator.random() < 0.08 and requests:
            name = generator.choice(list(requests))
            engine.cancel(name)
            cancelled.add(name)
            engine.check()
        collect(results, engine.step())
        engine.check()
        preempted += any(s.preemptions for s in engine.waiting)
    collected = run_out(engine, results)
    preempted += crowd(engine, requests, results)
    assert preempted, "the storm was meant to run out of pages"
    assert collected
    assert engine.pool.available == engine.pool.total
    for name, one in requests.items():
        if name not in cancelled:
            check_ending(one, results[name])


def crowd(engine: Engine, requests: dict[str, Request], results: dict[str, Result]) -> int:
    """Short prompts and long answers at once, more of them than pages: which of a storm's own requests meet depends
    on what is accepted, thus on the machine's arithmetic; these run out of pages anywhere."""
    for i in range(5):
        requests[f"c{i}"] = request(f"c{i}", [i + 1], LIMIT - 2)
        engine.submit(requests[f"c{i}"])
    preempted = 0
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
        preempted += any(s.preemptions for s in engine.waiting)
    return preempted


def watch_proposals(engine: Engine) -> None:
    """No block may reuse another block's noise: a request's counter never repeats, not after preemption either."""
    drafter = engine.drafter
    assert drafter is not None
    propose = drafter.propose
    used: set[tuple[str, int]] = set()

    def watched(sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        keys = {(sequence.request.request_id, sequence.proposals) for sequence in sequences}
        assert not keys & used
        used.update(keys)
        return propose(sequences, length)

    drafter.propose = watched  # type: ignore[method-assign]


def run_out(engine: Engine, results: dict[str, Result]) -> bool:
    """Step until idle."""
    for _ in range(2_000):
        if not engine.has_work:
            return True
        collect(results, engine.step())
        engine.check()
    return False


def check_ending(one: Request, result: Result) -> None:
    """The text ends where, and only where, its request says."""
    assert result.finish is not None
    tokens, end = result.tokens, one.end
    assert 1 <= len(tokens) <= end.max_tokens
    assert len(one.prompt) + len(tokens) <= LIMIT
    assert not set(tokens[:-1]) & end.stop_ids
    ended = tokens[-1] in end.stop_ids or len(tokens) == end.max_tokens or len(one.prompt) + len(tokens) == LIMIT
    assert ended
    assert len(result.logprobs) == (0 if one.logprobs is None else len(tokens))


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "mtp", "copies"])
def test_texts_in_a_storm_are_the_texts_in_calm(
    kind: str,
    target_dir: Path,
    hf_target: Qwen3ForCausalLM,
    drafter_dir: Drafters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy and coupled requests, whatever happens around them, come out as when served plainly and alone."""
    generator = random.Random(42)
    todo = []
    while len(todo) < 24:
        one = random_request(generator, str(len(todo)))
        greedy = one.sampling.temperature == 0
        coupled = one.sampling.seed is not None and one.speculation.verification is not Verification.REJECTION
        if greedy or coupled:
            todo.append(one)
    makers = {"eagle3": save_eagle3, "mtp": save_mtp}
    directory = makers[kind](tmp_path, hf_target, block=4) if kind in makers else drafter_dir()
    memory = 9 * page_bytes(target_dir, directory)
    policy = "auto" if kind == "copies" else "threshold"
    if kind == "copies":
        monkeypatch.setattr(lookup, "WIDTH", 1)
    stormy_engine = load(target_dir, directory, kv_memory=memory, max_model_len=LIMIT, policy=policy)
    calm = load(target_dir, max_model_len=LIMIT, max_running=1, prefix_cache=False)
    stormy, quiet = run(stormy_engine, todo), run(calm, todo)
    for one in todo:
        assert stormy[one.request_id].tokens == quiet[one.request_id].tokens, one
