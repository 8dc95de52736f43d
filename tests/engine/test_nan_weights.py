"""Weights with one row of NaN: who uses that token fails; nobody else notices, then or later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.types import FinishReason, Request, Sampling
from tests.conftest import VOCAB
from tests.engine.checkpoints import edit_tensors, make_target, save_drafter, save_target
from tests.engine.helpers import FIXED, OFF, coupled, load, rejection, request, run

BAD = 41  # the token whose embedding is NaN
GOOD_PROMPTS = {"short": (1, 2, 3), "page": tuple(range(3, 25)), "long": tuple(n % 40 for n in range(3, 72))}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untied target: with tied embeddings every logit row would have a NaN."""
    model = make_target(vocab=VOCAB, tied=False)
    folder = tmp_path_factory.mktemp("nan")
    drafter = save_drafter(folder / "drafter", model)
    target = save_target(folder / "target", model)
    embedding = model.model.embed_tokens.weight.detach().clone()
    embedding[BAD] = torch.nan
    edit_tensors(target, model__embed_tokens__weight=embedding)
    return target, drafter


def good(sampling: Sampling, **more: object) -> list[Request]:
    ban = Sampling(
        **{**{name: getattr(sampling, name) for name in ("temperature", "seed")}, "logit_bias": ((BAD, -100.0),)}
    )
    return [request(name, prompt, 20, ban, **more) for name, prompt in GOOD_PROMPTS.items()]  # type: ignore[arg-type]


def bad() -> list[Request]:
    """Prompts that hold the token at the start, at the end, in a later page; and one that is made to choose it."""
    prompts = {"b1": (BAD, *range(30)), "b2": (5, BAD), "b3": (*range(40), BAD, *range(30))}
    chooses = request("b4", (7, 8), 20, Sampling(temperature=0.0, logit_bias=((BAD, 100.0),)))
    return [*(request(name, prompt, 20) for name, prompt in prompts.items()), chooses]


@pytest.mark.parametrize("policy", ["auto", "fixed"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), coupled(5)], ids=["greedy", "coupled"])
def test_others_write_what_they_write_alone(checkpoints: tuple[Path, Path], policy: str, sampling: Sampling) -> None:
    target, drafter = checkpoints
    alone = run(load(target), good(sampling, speculation=OFF))
    # Few pages: what the failed ones held goes to the others.
    engine = load(target, drafter, policy=policy, kv_memory=49_152 * 24, max_model_len=160)
    for _ in range(3):
        together = run(engine, [*bad(), *good(sampling)])
        assert {name: together[name].tokens for name in GOOD_PROMPTS} == {n: r.tokens for n, r in alone.items()}
        for name in ("b1", "b2", "b3", "b4"):
            assert together[name].finish is FinishReason.ERROR
        assert together["b4"].tokens == [BAD]


def test_speculation_goes_on_after_a_failure(checkpoints: tuple[Path, Path]) -> None:
    target, drafter = checkpoints
    engine = load(target, drafter, policy="fixed")
    run(engine, bad())
    results = run(engine, good(Sampling(temperature=1.0, seed=3), speculation=rejection()))
    assert all(sum(delta.verified for delta in result.deltas) > 0 for result in results.values())
    assert all(result.finish is FinishReason.LENGTH for result in results.values())


def test_what_failed_is_not_found_in_the_cache(checkpoints: tuple[Path, Path]) -> None:
    """A passing fault must not fail every later request with the same beginning."""
    target, drafter = checkpoints
    engine = load(target, drafter, max_running=4, prefill_chunk=16, max_batch_tokens=32)  # several chunks a prompt
    prompt = (BAD, *(n % 40 for n in range(99)))
    for _ in range(2):
        result = run(engine, [request("b", prompt, 8, speculation=FIXED)])["b"]
        assert (result.finish, result.cached) == (FinishReason.ERROR, 0)
