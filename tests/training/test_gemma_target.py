"""Drafters for a Gemma 3 target: its features and logits are transformers', losses those of plain loops over the
exported files, and what is trained is what the engine drafts with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM

from engine.config import EngineConfig
from engine.errors import LoadError
from engine.loading import load_engine
from engine.training.anchors import Blocks, choose_anchors
from engine.training.export import read_target
from engine.training.frozen import Frozen
from engine.training.labels import partition
from engine.training.loop import Trainer, export, train
from engine.training.plan import Plan
from engine.training.sources import Draw, Stream
from engine.training.trainable import Batch
from engine.types import DraftBlock, Sampling, Sequence
from tests.engine.gemma import make_gemma
from tests.engine.helpers import FIXED, GREEDY, coupled, rejection, request, run
from tests.engine.lookahead import LookAheadOracle
from tests.engine.oracle import Oracle
from tests.training.test_loss import ALONE

SHAPES: list[dict[str, int]] = [
    {"hidden": 96, "window": 20},  # √96 is no number of few bits
    {"hidden": 64, "window": 7, "kv_heads": 4, "pattern": 2, "query_scale": 256},
    {"hidden": 64, "window": 512, "kv_heads": 2, "head_dim": 16},
]
KINDS = ("dspark", "dflash", "eagle3", "mtp")
FEW = "model.draft_vocab=40"
SETS = {
    "all tokens": (),
    "few tokens": (FEW,),
    "from the target": ("model.channel_scale=true", "model.init=target", "model.loss.soft=0.3"),
    "few tokens softly": (FEW, "model.loss.soft=0.3"),
}


@pytest.fixture(scope="module")
def gemma() -> Gemma3ForCausalLM:
    torch.set_num_threads(1)
    return make_gemma(hidden=96, layers=4)


@pytest.fixture(scope="module")
def folder(gemma: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma")
    gemma.save_pretrained(directory)
    return directory


@pytest.fixture
def plan(make_plan: Callable[..., Plan], folder: Path) -> Callable[..., Plan]:
    """As `make_plan`, for the Gemma 3 target."""

    def make(*changes: str, drafter: str = "dspark", out: str = "run") -> Plan:
        return make_plan(*changes, f"target={folder}", drafter=drafter, out=out)

    return make


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_by_layer_and_logits(shape: dict[str, int], tmp_path: Path) -> None:
    model = make_gemma(**shape)
    model.save_pretrained(tmp_path)
    frozen = Frozen(read_target(tmp_path), (-1, 0, 1, 2))
    tokens = torch.randint(1, 96, (2, 75), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True)
    features, hidden = frozen.run(tokens)
    close = {"atol": 3e-5, "rtol": 1e-4}
    torch.testing.assert_close(features, torch.cat(expected.hidden_states[:4], -1), **close)
    torch.testing.assert_close(hidden, expected.hidden_states[-1], **close)
    torch.testing.assert_close(hidden @ frozen.shared.head.T, expected.logits, **close)
    torch.testing.assert_close(frozen.shared.embed(tokens), model.model.embed_tokens(tokens))


def test_the_text_part_of_a_multimodal_checkpoint(gemma: Gemma3ForCausalLM, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "language_model.model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    tokens = torch.randint(1, 96, (1, 30))
    with torch.no_grad():
        expected = gemma(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(Frozen(read_target(tmp_path), (0,)).run(tokens)[1], expected, atol=3e-5, rtol=1e-4)
    del renamed["language_model.model.layers.1.post_feedforward_layernorm.weight"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"layers\.1\.post_feedforward_layernorm\.weight is missing"):
        read_target(tmp_path)


def test_the_vocabulary_is_streamed() -> None:
    """log Z and the best token, in pieces that do not divide it; of equals the first."""
    generator = torch.Generator().manual_seed(5)
    states, head = torch.randn(700, 16, generator=generator), torch.randn(331, 16, generator=generator)
    head[200] = head[11]
    logits = states @ head.T
    log_z, best = partition(states, head, budget=512 * 37)
    torch.testing.assert_close(log_z, logits.logsumexp(-1))
    assert torch.equal(best, logits.argmax(-1))


def made(plan: Plan, drafter_folder: Path) -> tuple[Trainer, Batch]:
    """A trainer whose weights vary and fit 16 bits, exported, and a batch of its own."""
    trainer, length = Trainer(plan, ALONE), 64
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.copy_((weight + 0.15 * torch.randn_like(weight)).bfloat16().float())
    trainer.model.export(drafter_folder)
    tokens, mask = trainer.mixture.tokens(trainer.mixture.draws(0, 2, length), length)
    return trainer, trainer.batch(tokens, mask, trainer.mixture.uniforms(0, 2, length))


class Mean:
    """Σ w·ℓ / Σ w."""

    def __init__(self) -> None:
        self.sum = self.weight = 0.0

    def add(self, weight: float, loss: float) -> None:
        self.sum, self.weight = self.sum + weight * loss, self.weight + weight

    @property
    def value(self) -> float:
        return self.sum / self.weight


def softly(logits: torch.Tensor, wanted: torch.Tensor, ids: list[int]) -> float:
    """−Σ p_t log p_d over the tokens that may be drafted, p_t renormalised to them."""
    label = wanted[ids] / wanted[ids].sum()
    return -float((label * logits.double().log_softmax(-1)[ids]).sum())


def gap_and_entropy(logits: torch.Tensor, wanted: torch.Tensor, goal: int) -> tuple[float, float]:
    """(‖p_d − p_t‖₁, −log p_d(goal), 0 where it cannot be drafted)."""
    draft = logits.double().softmax(-1)
    return float((draft - wanted).abs().sum()), -math.log(float(draft[goal])) if draft[goal] else 0.0


@pytest.mark.parametrize("drafter", ["dspark", "dflash"])
@pytest.mark.parametrize("few", SETS.values(), ids=list(SETS))
def test_a_steps_loss_is_the_papers(
    drafter: str, few: tuple[str, ...], plan: Callable[..., Plan], gemma: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    trainer, batch = made(plan(*few, "model.loss.distance=0.9", drafter=drafter), tmp_path / "drafter")
    model, oracle, mean = trainer.model, Oracle(tmp_path / "drafter", gemma), Mean()
    terms, options = model.options.loss, model.options
    ids = list(range(96)) if model.vocabulary.ids is None else model.vocabulary.ids.tolist()
    anchors = choose_anchors(batch, options.anchors * 65 // 256, options.block_size, options.first_anchor).anchors
    for b, row in enumerate(anchors.tolist()):
        tokens = batch.tokens[b].tolist()
        with torch.no_grad():
            target = gemma(torch.tensor([tokens])).logits[0].double().softmax(-1)
        for n in row:
            block, state = oracle.block(tokens[: n + 1]), None
            for k in range(options.block_size):
                if n + k + 1 >= len(tokens) or not batch.loss_mask[b, n + k + 1]:
                    break
                logits, confidence, state = oracle.step(block, k, tokens[n + k], state)
                gap, entropy = gap_and_entropy(logits, target[n + k], tokens[n + k + 1])
                loss = terms.cross_entropy * entropy + terms.distance * gap
                loss += terms.soft * softly(logits, target[n + k], ids)
                if confidence is not None:
                    label = 1 - gap / 2
                    loss -= terms.confidence * (label * math.log(confidence) + (1 - label) * math.log(1 - confidence))
                mean.add(math.exp(-k / terms.decay), loss)
    with torch.no_grad():
        assert float(model.loss(batch)[0]) == pytest.approx(mean.value, rel=1e-5)


@pytest.mark.parametrize("drafter", ["eagle3", "mtp"])
@pytest.mark.parametrize("few", SETS.values(), ids=list(SETS))
def test_an_unrolled_steps_loss_is_the_plain_one(
    drafter: str, few: tuple[str, ...], plan: Callable[..., Plan], gemma: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    changes = ("model.steps=3", "model.loss.soft=0.7", "model.loss.cross_entropy=0.2", "model.loss.distance=0.3")
    trainer, batch = made(plan(*few, *changes, drafter=drafter), tmp_path / "drafter")
    model, oracle, mean = trainer.model, LookAheadOracle(tmp_path / "drafter", gemma), Mean()
    ids = list(range(96)) if model.vocabulary.ids is None else model.vocabulary.ids.tolist()
    anchors = choose_anchors(batch, model.anchors * 65 // 256, model.steps, model.first_anchor).anchors
    for b, row in enumerate(anchors.tolist()):
        tokens = batch.tokens[b].tolist()
        with torch.no_grad():
            target = gemma(torch.tensor([tokens])).logits[0].double().softmax(-1)
        for n in row:
            state, context = None, oracle.block(tokens[: n + 1])
            for k in range(model.steps):
                if n + k + 1 >= len(tokens) or not batch.loss_mask[b, n + k + 1]:
                    break
                logits, _, state = oracle.step(context, k, tokens[n + k], state)
                gap, entropy = gap_and_entropy(logits, target[n + k], tokens[n + k + 1])
                soft = softly(logits, target[n + k], ids)
                mean.add(0.8**k, 0.7 * soft + 0.2 * entropy + 0.3 * gap)
    with torch.no_grad():
        assert float(model.loss(batch)[0]) == pytest.approx(mean.value, rel=1e-5)


@pytest.mark.parametrize("drafter", KINDS)
@pytest.mark.parametrize("few", SETS.values(), ids=list(SETS))
def test_the_engine_drafts_from_what_was_trained(
    drafter: str, few: tuple[str, ...], plan: Callable[..., Plan], folder: Path, tmp_path: Path
) -> None:
    """Teacher-forced on what the engine drafted, the trained module gives the distribution that it drafted from."""
    changes = ("model.steps=3",) if drafter in ("eagle3", "mtp") else ("model.block_size=4",)
    trainer, _ = made(plan(*few, *changes, drafter=drafter), tmp_path / "drafter")
    model, frozen, compared = trainer.model, trainer.frozen, 0
    config = EngineConfig(
        str(folder), str(tmp_path / "drafter"), dtype="float32", kv_memory=2**22, max_model_len=128, policy="fixed"
    )
    engine = load_engine(config)
    assert engine.drafter is not None
    propose = engine.drafter.propose
    ids = torch.arange(96) if model.vocabulary.ids is None else model.vocabulary.ids

    def judged(sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        nonlocal compared
        block = propose(sequences)
        assert block.logits is not None and block.log_z is not None
        for row, sequence in enumerate(sequences):
            n, drafted = len(sequence.tokens) - 1, block.tokens[row].tolist()
            tokens = torch.tensor([[*sequence.tokens, *drafted]])
            place = torch.arange(n, n + len(drafted))[None, None]
            asked = torch.ones_like(place).bool()
            blocks = Blocks(place[..., 0], place, tokens[0, place], tokens[0, place + 1], place, asked)
            features, hidden = frozen.run(tokens)
            batch = Batch(tokens, features, hidden, tokens >= 0, tokens.float(), frozen.shared)
            with torch.no_grad():
                if drafter in ("eagle3", "mtp"):
                    states = model.hidden(batch, blocks)
                else:
                    states = model.hidden(features, blocks, frozen.shared)
                logits = F.linear(states, frozen.shared.head[ids])[0, 0]
                if drafter == "dspark":
                    low = model.markov_head.markov_w1(blocks.previous)
                    latents = model.markov_head.latents(low, states)[0, 0]
                    logits = logits + F.linear(latents, model.markov_head.markov_w2.weight)
            expected = torch.zeros(len(drafted), 96)
            expected[:, ids] = logits.softmax(-1)
            served = (block.logits[row] - block.log_z[row, :, None]).exp()
            known = block.log_z[row].isfinite()  # a block ends where its sequence's pages end
            torch.testing.assert_close(served[known], expected[known], atol=5e-4, rtol=1e-2)
            compared += bool(known.all())
        return block

    engine.drafter.propose = judged  # type: ignore[method-assign]
    prompts = ((5, 6, 7), tuple(range(1, 40)), tuple(range(60, 20, -1)))
    run(engine, [request(str(i), p, 14, Sampling(seed=i), rejection()) for i, p in enumerate(prompts)])
    assert compared >= 10


@pytest.mark.parametrize("drafter", KINDS)
def test_trained_exported_and_served(drafter: str, plan: Callable[..., Plan], folder: Path, tmp_path: Path) -> None:
    """By the commands' own functions, in bf16, with a cache: speculation changes no text."""
    (folder / "NOTICE").write_text("Provided under its terms.\n")
    (folder / "THEIR_TERMS.html").write_text("terms")
    changes = ("run.steps=3", FEW, f"data.cache={tmp_path / 'cache'}", "run.precision=bf16")
    begin = ("model.init=bigrams",) if drafter == "dspark" else ()
    chosen = plan(*changes, *begin, drafter=drafter)
    out = train(chosen)
    assert json.loads((out / "config.json").read_text())["draft_vocab_size"] == 40
    for place in (out, export(chosen.out, tmp_path / "copy")):
        assert (place / "NOTICE").read_text().startswith("Provided under its terms.\n\nDerived: ")
        assert (place / "THEIR_TERMS.html").read_text() == "terms"
    texts, kept = [], 0
    for draft in ("none", str(out)):
        engine = load_engine(
            EngineConfig(str(folder), draft, dtype="float32", kv_memory=2**22, max_model_len=128, policy="fixed")
        )
        requests = [
            request(f"{i} {sampling.seed}", tuple(range(3 + i, 30 + 9 * i)), 16, sampling, FIXED)
            for i in range(3)
            for sampling in (GREEDY, coupled(i))
        ]
        results = run(engine, requests)
        texts.append({name: result.tokens for name, result in results.items()})
        kept = sum(delta.verified for result in results.values() for delta in result.deltas)
    assert texts[0] == texts[1] and kept > 0


def test_labels_from_a_cache_are_those_computed_anew(plan: Callable[..., Plan], tmp_path: Path) -> None:
    trainer = Trainer(plan(FEW, f"data.cache={tmp_path / 'cache'}"), ALONE)
    windows = trainer.mixture.draws(0, 4, 64)
    windows = [window for window in windows if window.start % 256 == 0]
    tokens, mask = trainer.mixture.tokens(windows, 64)
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1))
    first, again = (trainer.batch(tokens, mask, draws, windows) for _ in range(2))
    assert first.log_z is not None and again.log_z is not None
    assert torch.equal(first.log_z, again.log_z) and torch.equal(first.hidden, again.hidden)
    logits = again.hidden @ trainer.frozen.shared.head.T
    asked = again.log_z.isfinite()
    assert torch.equal(asked[:, :-1], mask[:, 1:]) and not asked[:, -1].any()
    torch.testing.assert_close(again.log_z[asked], logits.logsumexp(-1)[asked])
    assert again.best is not None and torch.equal(again.best[asked], logits.argmax(-1)[asked])
    with torch.no_grad():
        known, anew = (float(trainer.model.loss(b)[0]) for b in (again, replace(again, log_z=None, best=None)))
    assert known == pytest.approx(anew, rel=1e-6)


def _starts(stream: Stream) -> range:
    """Where windows of 256 tokens may begin: in a source of answers, wherever there are tokens."""
    return range(0, len(stream.tokens) - (0 if stream.starts is not None else 256), 256)


def test_rows_begin_where_answers_do(plan: Callable[..., Plan], folder: Path, tmp_path: Path) -> None:
    """A target whose texts begin with a token is never shown a row without it."""
    rng = np.random.default_rng(0)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    config = json.loads((folder / "config.json").read_text())
    begin = config["bos_token_id"]
    data = tmp_path / "own"
    data.mkdir()
    rows = []
    for i in range(40):
        prompt, answer = [begin, *rng.integers(3, 96, 5 + i % 7).tolist()], rng.integers(3, 96, 60 + 8 * i).tolist()
        rows.append({"name": str(i), "domain": "ab"[i % 2], "prompt_tokens": prompt, "answer_tokens": answer})
    (data / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = (f"data.sources=['{data}', '{tmp_path / 'raw.npy'}']", f"data.heldout={data}")
    np.save(tmp_path / "raw.npy", rng.integers(3, 96, 3000))
    trainer = Trainer(plan(*sources, "data.length=256", "data.long=512", f"data.cache={tmp_path / 'cache'}"), ALONE)
    assert {stream.name for stream in trainer.texts} == {"a", "b"}
    assert trainer.cache is not None
    windows = [Draw(s, at) for s, stream in enumerate(trainer.mixture.streams) for at in _starts(stream)]
    assert len(windows) == trainer.cache.rows  # each has a place in the cache, one that the last answer cuts short, too
    seen = set()
    for length in (64, 512):
        for step in range(20):
            draws = trainer.mixture.draws(step, 4, length)
            tokens, mask = trainer.mixture.tokens(draws, length)
            assert tokens.shape == (4, length + 1) and (tokens[:, 0] == begin).all()
            for draw, text, asked in zip(draws, tokens.tolist(), mask.tolist(), strict=True):
                if draw.source:
                    continue
                row = next(r for r in rows if text[: len(r["prompt_tokens"])] == r["prompt_tokens"])
                whole = [*row["prompt_tokens"], *row["answer_tokens"]]
                size, first = min(len(whole), length + 1), len(row["prompt_tokens"])
                assert text[:size] == whole[:size]
                assert asked[:size] == [False] * first + [True] * (size - first)
                seen.add(row["name"])
    assert len(seen) == 40
    assert all((stream.tokens[np.array(stream.starts) * 256] == begin).all() for stream in trainer.texts)
