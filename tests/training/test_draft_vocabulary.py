"""Reduced draft vocabularies under training: counted, stored, scored and served."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.loading import load_engine
from engine.training.draft_vocabulary import most_frequent
from engine.training.loop import Trainer, export, train
from engine.training.plan import Plan
from engine.training.settings import SettingsError
from engine.training.sources import Stream
from engine.training.step_loss import step_terms
from engine.types import EndConditions, Request, Sampling, Speculation, SpeculationMode
from tests.training.conftest import weights
from tests.training.test_loss import ALONE, plain_loss, trainer_and_batch


def test_the_most_frequent_tokens_are_counted_as_they_are_met() -> None:
    """Sources count by their shares, prompts not at all; of equals the lowest id goes first."""
    common = Stream("one", np.array([1] * 200 + [2] * 90 + [3] * 10), None)
    tokens, asked = np.array([4] * 400 + [5] * 50 + [2] * 50), np.array([False] * 400 + [True] * 100)
    answers = Stream("two", tokens, asked)
    ids, covered = most_frequent([common, answers], [0.5, 0.5], 3, 10)
    assert ids.tolist() == [1, 2, 5] and covered == pytest.approx(1 - 0.5 / 30)
    assert most_frequent([common], [1.0], 5, 10)[0].tolist() == [0, 1, 2, 3, 4]
    for wrong in (-1, 10):
        with pytest.raises(SettingsError, match=r"draft_vocab .* must lie in 1 … 9"):
            most_frequent([common], [1.0], wrong, 10)


def test_terms_by_hand() -> None:
    """p_d = (¼, ¾) on ids 3 and 1, p_t = (.1, .2, .3, .4): the distance counts what cannot be drafted."""
    draft, target = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    ids = torch.tensor([3, 1])
    _, entropy, distance, agree = step_terms(draft, target, torch.tensor([0]), ids)
    assert float(distance) == pytest.approx(0.15 + 0.55 + 0.1 + 0.3)
    assert float(1 - distance / 2) == pytest.approx(0.25 + 0.2)  # Σ min(p_d, p_t)
    assert float(entropy) == pytest.approx(-np.log(0.25)) and float(agree) == 0
    assert float(step_terms(draft, target, torch.tensor([-100]), ids)[1]) == 0


@pytest.mark.parametrize("drafter", ["dspark", "dflash"])
def test_a_steps_loss_is_the_papers(make_plan: Callable[..., Plan], drafter: str) -> None:
    trainer, batch = trainer_and_batch(make_plan("model.draft_vocab=40", "model.loss.distance=0.9", drafter=drafter))
    loss, metrics = trainer.model.loss(batch)
    with torch.no_grad():
        assert float(loss) == pytest.approx(plain_loss(trainer, batch), rel=1e-5)
    assert 1 <= float(metrics["tau"][0] / metrics["tau"][1]) < 8


@pytest.mark.parametrize("drafter", ["dspark", "eagle3"])
def test_trained_stored_and_served(make_plan: Callable[..., Plan], drafter: str, tmp_path: Path) -> None:
    plan = make_plan("run.steps=2", "model.draft_vocab=40", drafter=drafter)
    folder = train(plan)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert config["draft_vocab_size"] == 40 and int(tensors["t2d"].sum()) == 40
    ids = torch.arange(40) + tensors["d2t"]
    assert torch.equal(tensors["t2d"].nonzero().flatten(), ids)
    if drafter == "dspark":
        assert tensors["markov_head.markov_w2.weight"].shape == (40, 8)
    copy = export(plan.out, tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    texts, drafted = [], set()
    for draft in ("none", str(folder)):
        engine = load_engine(EngineConfig(str(plan.target), draft, kv_memory=2**22, max_model_len=128))
        request = Request("r", (5, 6, 7), EndConditions(24), Sampling(1.0, seed=3), Speculation(SpeculationMode.FIXED))
        engine.submit(request)
        if engine.drafter is not None:
            propose = engine.drafter.propose

            def watched(sequences, length, propose=propose):  # type: ignore[no-untyped-def]
                block = propose(sequences, length)
                drafted.update(block.tokens.flatten().tolist())
                return block

            engine.drafter.propose = watched  # type: ignore[method-assign]
        texts.append([token for _ in range(40) if engine.has_work for delta in engine.step() for token in delta.tokens])
    assert texts[0] == texts[1] and drafted <= set(ids.tolist())


def test_a_resumed_run_keeps_its_vocabulary(make_plan: Callable[..., Plan], token_file: Path, tmp_path: Path) -> None:
    """Even where the data has changed under it."""
    path = tmp_path / "own.npz"
    path.write_bytes(token_file.read_bytes())
    changes = ("model.draft_vocab=40", f"data.sources=['{path}']")
    train(make_plan("run.steps=2", *changes))
    with np.load(token_file) as arrays:
        np.savez(path, all=(arrays["all"] * 7 + 3) % 96)
    plan = make_plan("run.steps=3", *changes)
    resumed = Trainer(plan, ALONE)
    fresh = Trainer(replace(plan, out=tmp_path / "fresh"), ALONE)
    assert not torch.equal(resumed.draft_ids, fresh.draft_ids)
    before = weights(plan.out)
    assert all(torch.equal(before[name], value) for name, value in resumed.model.state_dict().items())
