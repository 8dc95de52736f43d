"""Texts: drafted equals plain equals transformers, with penalties, logprobs, preemption and every mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.engine import Engine
from engine.types import Sampling, Speculation, SpeculationMode, Verification
from tests.engine.checkpoints import HEADS
from tests.engine.helpers import (
    FIXED,
    GREEDY,
    OFF,
    PAGE_BYTES,
    THRESHOLD,
    coupled,
    generate,
    load,
    rejection,
    request,
    run,
    scripted,
)

Drafters = Callable[..., Path]
Prompts = list[tuple[int, ...]]
PENALISED = {
    "repetition": Sampling(temperature=0.0, repetition_penalty=1.4),
    "presence": Sampling(temperature=0.0, presence_penalty=1.5),
    "frequency": Sampling(temperature=0.0, frequency_penalty=0.7),
    "bias": Sampling(temperature=0.0, logit_bias=((3, 4.0), (9, -5.0))),
    "all": Sampling(
        temperature=0.0, repetition_penalty=0.8, presence_penalty=0.5, frequency_penalty=0.4, logit_bias=((3, 2.0),)
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_greedy_drafted_equals_transformers(
    head: str, hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters, prompts: Prompts
) -> None:
    engine = load(target_dir, drafter_dir(head=head), prefill_chunk=13)
    speculations = (FIXED, THRESHOLD, OFF, Speculation())
    todo = [request(str(i), p, 20, GREEDY, speculations[i % 4]) for i, p in enumerate(prompts)]
    results = run(engine, todo)
    for i, prompt in enumerate(prompts):
        assert results[str(i)].tokens == generate(hf_target, prompt, 20)


def penalised_oracle(model: Qwen3ForCausalLM, prompt: tuple[int, ...], tokens: int, s: Sampling) -> list[int]:
    """Greedy under penalties, one full forward a token; presence, frequency and bias as OpenAI defines them."""
    out: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *out]])).logits[0, -1].clone()
        for token in {*prompt, *out}:
            logits[token] *= s.repetition_penalty if logits[token] < 0 else 1 / s.repetition_penalty
        for token in set(out):
            logits[token] -= s.presence_penalty + s.frequency_penalty * out.count(token)
        for token, value in s.logit_bias:
            logits[token] += value
        out.append(int(logits.argmax()))
    return out


@pytest.mark.parametrize("kind", PENALISED)
def test_penalties_count_the_drafted_tokens(kind: str, hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    """A drafter that knows the right text has all of it accepted, only if each position counts the drafts before it."""
    sampling, prompt = PENALISED[kind], (4, 4, 60, 11, 3)
    expected = penalised_oracle(hf_target, prompt, 25, sampling)
    if kind == "repetition":
        assert expected == generate(hf_target, prompt, 25, repetition_penalty=1.4)
    plain = run(load(target_dir), [request("a", prompt, 25, sampling)])["a"]
    assert plain.tokens == expected
    drafted = run(scripted(target_dir, {prompt: expected}), [request("a", prompt, 25, sampling, FIXED)])["a"]
    assert drafted.tokens == expected
    assert drafted.drafted_tokens_kept == sum(d.verified for d in drafted.deltas) == 20


@pytest.mark.parametrize("kind", PENALISED)
def test_penalties_with_a_real_drafter_and_preemption(
    kind: str, target_dir: Path, drafter_dir: Drafters, prompts: Prompts
) -> None:
    todo = [request(str(i), p, 16, PENALISED[kind]) for i, p in enumerate(prompts)]
    plain = run(load(target_dir), todo)
    tight = run(load(target_dir, drafter_dir(), kv_memory=12 * PAGE_BYTES, max_model_len=96, policy="fixed"), todo)
    for name, result in plain.items():
        assert tight[name].tokens == result.tokens


@pytest.mark.parametrize("sampling", [GREEDY, coupled(0), coupled(0, 0.7, top_p=0.9)], ids=["greedy", "T=1", "top-p"])
def test_preemption_keeps_texts(sampling: Sampling, target_dir: Path, drafter_dir: Drafters, prompts: Prompts) -> None:
    todo = [request(str(i), p, 24, sampling, priority=i % 2) for i, p in enumerate(prompts)]
    plain = run(load(target_dir), todo)
    engine = load(target_dir, drafter_dir(), kv_memory=10 * PAGE_BYTES, max_model_len=96, policy="fixed")
    preempted = count_preemptions(engine)
    tight = run(engine, todo)
    assert preempted, "the pool was meant to run out"
    for name, result in plain.items():
        assert tight[name].tokens == result.tokens


def count_preemptions(engine: Engine) -> set[str]:
    """Ids of the requests that were sent back to the queue."""
    seen: set[str] = set()
    step = engine.step

    def watched():  # type: ignore[no-untyped-def]
        deltas = step()
        seen.update(s.request.request_id for s in (*engine.running, *engine.waiting) if s.preemptions)
        return deltas

    engine.step = watched  # type: ignore[method-assign]
    return seen


def test_a_rejection_seed_repeats_itself(target_dir: Path, drafter_dir: Drafters, prompts: Prompts) -> None:
    """Under the same schedule an explicit REJECTION with a seed is reproducible; other seeds differ."""

    def texts(seed: int) -> list[list[int]]:
        engine = load(target_dir, drafter_dir(), policy="fixed")
        todo = [request(str(i), p, 16, coupled(seed + i), rejection()) for i, p in enumerate(prompts)]
        return [result.tokens for result in run(engine, todo).values()]

    assert texts(1) == texts(1)
    assert texts(1) != texts(100)


def test_unseeded_requests_differ(target_dir: Path, prompts: Prompts) -> None:
    todo = [request(str(i), prompts[4], 24, Sampling()) for i in range(4)]
    results = run(load(target_dir), todo)
    assert len({tuple(result.tokens) for result in results.values()}) == 4


def test_the_default_verification(target_dir: Path) -> None:
    engine = load(target_dir)
    for name, sampling, speculation in (
        ("unseeded", Sampling(), Speculation()),
        ("seeded", Sampling(seed=0), Speculation()),
        ("explicit", Sampling(seed=0), rejection()),
        ("unseeded coupled", Sampling(), Speculation(verification=Verification.COUPLED)),
    ):
        engine.submit(request(name, (1, 2), 2, sampling, speculation))
    modes = [sequence.verification.value for sequence in engine.waiting]
    assert modes == ["rejection", "coupled", "rejection", "coupled"]


def test_seeds_use_all_64_bits(target_dir: Path) -> None:
    seeds = (1, 1 + 2**32, 1 + 2**63, 2**64 - 1)
    results = run(load(target_dir), [request(str(seed), (1, 2, 3), 24, coupled(seed)) for seed in seeds])
    assert len({tuple(result.tokens) for result in results.values()}) == 4


@pytest.mark.parametrize("mode", list(SpeculationMode))
@pytest.mark.parametrize("sampling", [GREEDY, coupled(7, 0.8, top_k=9, repetition_penalty=1.3)], ids=["greedy", "T=.8"])
def test_logprobs_are_transformers_log_softmax(
    mode: SpeculationMode, sampling: Sampling, hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters,
    prompts: Prompts,
) -> None:  # fmt: skip
    """Of the raw logits: before penalties, temperature and filters; one entry for every token that goes out."""
    engine = load(target_dir, drafter_dir(), policy="fixed")
    todo = [request(str(n), prompts[5 + n], 9, sampling, Speculation(mode), logprobs=n) for n in (0, 1, 3)]
    results = run(engine, [*todo, request("without", prompts[3], 9, sampling, Speculation(mode))])
    assert results["without"].logprobs == []
    for n in (0, 1, 3):
        prompt, result = prompts[5 + n], results[str(n)]
        assert [entry.token_id for entry in result.logprobs] == result.tokens
        for delta in result.deltas:
            assert len(delta.logprobs) == len(delta.tokens)
        with torch.inference_mode():
            logits = hf_target(torch.tensor([[*prompt, *result.tokens]])).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        for entry, row in zip(result.logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            values, ids = row.topk(n)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head", HEADS)
def test_sixteen_bits_draft_and_verify(
    dtype: str, head: str, target_dir: Path, drafter_dir: Drafters, prompts: Prompts
) -> None:
    """Every way to sample works in 16 bits too; greedy texts agree with plain decoding, but for float16's rounding."""
    modes = ((GREEDY, FIXED), (coupled(3), FIXED), (Sampling(top_p=0.9), rejection()))
    engine = load(target_dir, drafter_dir(head=head), dtype=dtype, policy="fixed")
    results = run(engine, [request(str(i), p, 12, *modes[i % 3]) for i, p in enumerate(prompts)])
    assert all(len(result.tokens) == 12 for result in results.values())
    assert sum(result.drafted_tokens_kept for result in results.values()) > 0
    greedy = [request(str(i), prompts[i], 12) for i in range(0, len(prompts), 3)]
    plain = run(load(target_dir, dtype=dtype), greedy)
    same = sum(results[name].tokens == result.tokens for name, result in plain.items())
    assert same == len(plain) if dtype == "bfloat16" else same >= len(plain) // 2
