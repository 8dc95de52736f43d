"""Eagle3 and MTP-1 under training: their steps are those that are served, their losses those of plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.training.anchors import Blocks, choose_anchors
from engine.training.export import read_target
from engine.training.frozen import Frozen
from engine.training.loop import train
from engine.training.plan import Plan
from engine.training.settings import SettingsError
from engine.training.step_loss import StepTerms
from engine.training.trainable import Batch, find
from engine.training.unrolled import UnrolledDrafter
from engine.types import DraftBlock, Sampling, Sequence
from tests.engine.helpers import FIXED, coupled, rejection, request, run
from tests.engine.lookahead import LookAheadOracle

FEW = tuple(range(2, 96, 3))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {"steps": 4}),
    "eagle3, few ids": ("eagle3", {"steps": 3, "feature_layers": (-1, 2), "draft_ids": FEW}),
    "mtp": ("mtp", {}),
    "mtp, re-fed": ("mtp", {"steps": 3}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Bench:
    """A drafter with random weights that fit 16 bits, its target, and both on disk."""

    def __init__(self, kind: str, target: Path, folder: Path, **options: Any) -> None:
        torch.manual_seed(11)
        name, own = KINDS[kind]
        options = {**own, **options}
        if "draft_ids" in options:
            np.save(folder / "ids.npy", np.array(options["draft_ids"]))
            options["draft_ids"] = str(folder / "ids.npy")
        made, self.target = find(name), target
        self.model: UnrolledDrafter = made(made.Options(**options), Frozen(read_target(target), ()).shared)
        self.frozen = Frozen(read_target(target), self.model.feature_layers)
        with torch.no_grad():
            for weight in self.model.parameters():
                fresh = weight + 0.15 * torch.randn_like(weight)
                weight.copy_(fresh.bfloat16().float())
        self.folder = folder / "drafter"
        self.model.export(self.folder)

    def batch(self, tokens: torch.Tensor, seed: int = 3) -> Batch:
        features, hidden = self.frozen.run(tokens)
        draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
        return Batch(tokens, features, hidden, (tokens != 0).cummin(1).values, draws, self.frozen.shared)

    def engine(self) -> Engine:
        return load_engine(
            EngineConfig(str(self.target), str(self.folder), kv_memory=2**22, max_model_len=128, policy="fixed")
        )


@kinds
def test_the_steps_are_those_that_are_served(kind: str, tiny_target: Path, tmp_path: Path) -> None:
    """Teacher-forced on what the engine drafted, every step gives the distribution that the engine drafted from."""
    bench = Bench(kind, tiny_target, tmp_path)
    model, engine = bench.model, bench.engine()
    assert engine.drafter is not None
    steps, propose = engine.drafter.block_size, engine.drafter.propose
    assert steps == model.steps
    compared = 0

    def judged(sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        nonlocal compared
        block = propose(sequences)
        assert block.logits is not None and block.log_z is not None
        for row, sequence in enumerate(sequences):
            n, drafted = len(sequence.tokens) - 1, block.tokens[row].tolist()
            tokens = torch.tensor([[*sequence.tokens, *drafted]])
            place = torch.arange(n, n + steps)[None, None]
            blocks = Blocks(
                place[..., 0], place, tokens[0, place], tokens[0, place + 1], place, torch.ones_like(place).bool()
            )
            with torch.no_grad():
                hidden = model.hidden(bench.batch(tokens), blocks)[0, 0]
            head = model.vocabulary.rows_of(bench.frozen.shared.head)
            expected = torch.zeros(steps, 96)
            ids = torch.arange(96) if model.vocabulary.ids is None else model.vocabulary.ids
            expected[:, ids] = F.linear(hidden, head).softmax(-1)
            served = (block.logits[row] - block.log_z[row, :, None]).exp()
            known = block.log_z[row].isfinite()  # a block ends where its sequence's pages end
            torch.testing.assert_close(served[known], expected[known], atol=5e-4, rtol=1e-2)
            compared += bool(known.all())
        return block

    engine.drafter.propose = judged  # type: ignore[method-assign]
    prompts = ((5, 6, 7), tuple(range(1, 40)), tuple(range(60, 20, -1)))
    run(engine, [request(str(i), p, 14, Sampling(seed=i), rejection()) for i, p in enumerate(prompts)])
    assert compared >= 10


def plain_loss(bench: Bench, batch: Batch, terms: StepTerms, oracle: LookAheadOracle) -> float:
    """The weighted mean, block by block and step by step, from the exported files and transformers' target."""
    model = bench.model
    count = model.anchors * batch.tokens.shape[1] // 256 if model.anchors else batch.tokens.shape[1]
    anchors = choose_anchors(batch, count, model.steps, model.first_anchor).anchors
    ids = range(96) if model.vocabulary.ids is None else model.vocabulary.ids.tolist()
    total = weights = 0.0
    for b, row in enumerate(anchors.tolist()):
        tokens = batch.tokens[b].tolist()
        wanted = oracle.target(torch.tensor([tokens])).logits[0].double().softmax(-1)
        for n in row:
            state, context = None, oracle.block(tokens[: n + 1])
            for k in range(model.steps):
                if n < model.first_anchor or n + k + 1 >= len(tokens) or not batch.loss_mask[b, n + k + 1]:
                    break
                logits, _, state = oracle.step(context, k, tokens[n + k], state)
                draft, target = logits.double().softmax(-1), wanted[n + k]
                mass = sum(float(target[i]) for i in ids)
                soft = -sum(float(target[i]) / mass * math.log(float(draft[i])) for i in ids)
                goal = tokens[n + k + 1]
                hard = -math.log(float(draft[goal])) if goal in ids else 0.0
                gap = float((draft - target).abs().sum())
                weight = terms.decay**k
                weights += weight
                total += weight * (terms.soft * soft + terms.cross_entropy * hard + terms.distance * gap)
    return total / weights


@kinds
@torch.no_grad()
def test_a_steps_loss_is_the_plain_one(kind: str, tiny_target: Path, tmp_path: Path) -> None:
    terms = StepTerms(soft=0.7, cross_entropy=0.2, distance=0.3, decay=0.8)
    bench = Bench(kind, tiny_target, tmp_path, anchors=64, first_anchor=2, loss=terms)
    tokens = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(2))
    tokens[1, 17] = 0  # a document ends: nothing after it is asked for
    batch = bench.batch(tokens)
    loss, metrics = bench.model.loss(batch)
    target = Qwen3ForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    expected = plain_loss(bench, batch, terms, LookAheadOracle(bench.folder, target))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert metrics["acceptance"][0].shape == (bench.model.steps,)
    assert 1 <= float(metrics["tau"][0] / metrics["tau"][1]) <= 1 + bench.model.steps


@pytest.mark.parametrize("kind", ["eagle3, few ids", "mtp, re-fed"])
def test_chunks_change_neither_loss_nor_gradients(kind: str, tiny_target: Path, tmp_path: Path) -> None:
    tokens = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(4))
    found = []
    for chunk in (5 * 96, 2**24):
        (tmp_path / str(chunk)).mkdir()
        bench = Bench(kind, tiny_target, tmp_path / str(chunk), chunk=chunk)
        loss, _ = bench.model.loss(bench.batch(tokens))
        loss.backward()
        found.append((loss.detach(), [weight.grad for weight in bench.model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None and torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_every_position_by_the_published_recipe(tiny_target: Path, tmp_path: Path) -> None:
    """anchors = 0: each position from the first on is a block, the last one of a single step."""
    bench = Bench("eagle3", tiny_target, tmp_path, anchors=0, first_anchor=3)
    _, metrics = bench.model.loss(bench.batch(torch.randint(1, 96, (2, 20))))
    assert metrics["acceptance"][1].tolist() == [32, 30, 28, 26]


@pytest.mark.parametrize("drafter", ["eagle3", "mtp"])
def test_a_trained_drafter_drafts_what_it_learnt(make_plan: Callable[..., Plan], drafter: str) -> None:
    """The same run by the command's own loop: the loss falls, and the engine accepts more than of an untrained one."""
    changes = ("model.steps=3", "optim.kind=adamw", "optim.adam_lr=3e-3", "data.long=64")
    plan = make_plan("run.steps=60", *changes, drafter=drafter)
    folder = train(plan)
    log = [json.loads(line) for line in (plan.out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.1  # most of it is the target's own entropy
    assert log[-1]["tau"] > log[0]["tau"] + 0.1
    kept = []
    for draft in (folder, train(make_plan("run.steps=1", *changes, drafter=drafter, out="fresh"))):
        engine = load_engine(EngineConfig(str(plan.target), str(draft), kv_memory=2**22, max_model_len=128))
        assert engine.info.drafter == drafter
        requests = [request(str(i), (5 + i, 6, 7), 60, coupled(i, 0.6), FIXED) for i in range(20)]
        results = run(engine, requests).values()
        kept.append(sum(result.drafted_tokens_kept for result in results))
    assert kept[0] > kept[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a readable"),
        (np.zeros((2, 2), int), "one list of whole numbers"),
        (np.array([1.5]), "one list of whole numbers"),
        (np.array([1, 1]), "distinct ids"),
        (np.array([96]), r"distinct ids in 0 … 95"),
    ],
)
def test_a_draft_vocabulary_that_cannot_be_is_refused(
    content: np.ndarray | None, message: str, tiny_target: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ids.npy"
    path.write_text("no array") if content is None else np.save(path, content)
    made = find("eagle3")
    with pytest.raises(SettingsError, match=message):
        made(replace(made.Options(), draft_ids=str(path)), Frozen(read_target(tiny_target), ()).shared)


def test_options_that_cannot_be_are_refused() -> None:
    for drafter, wrong in (("eagle3", {"steps": 0}), ("eagle3", {"feature_layers": (3, 1)}), ("mtp", {"anchors": -1})):
        with pytest.raises(SettingsError):
            find(drafter).Options(**wrong)
