"""Gemma 3 equals transformers': whole, in chunks, token by token, from every spelling; drafting changes no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM

from engine.errors import LoadError
from engine.types import PlanRow
from tests.engine.checkpoints import edit_config, edit_tensors
from tests.engine.gemma import make_gemma, save_gemma_drafter
from tests.engine.helpers import FIXED, GREEDY, coupled, generate, load, request, run, text
from tests.engine.oracle import Oracle
from tests.engine.test_drafter import MIX, Judge
from tests.engine.test_parity import close, logits, oracle, sequence, some_tokens


@pytest.fixture(scope="module")
def gemma() -> Gemma3ForCausalLM:
    torch.set_num_threads(1)
    return make_gemma()


@pytest.fixture(scope="module")
def gemma_dir(gemma: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma")
    gemma.save_pretrained(directory)
    return directory


def test_prefill_chunked_prefill_and_decode(gemma: Gemma3ForCausalLM, gemma_dir: Path) -> None:
    """A text of several pages and several windows."""
    engine = load(gemma_dir)
    tokens = some_tokens(75, 96)
    expected = oracle(gemma, tokens)
    close(logits(engine, PlanRow(sequence(tokens, range(5)), 0, 75)), expected)
    chunked = sequence(tokens, (9, 7, 11, 3, 5))
    parts, start = [], 0
    for count in (1, 15, 2, 30, 17):
        parts.append(logits(engine, PlanRow(chunked, start, count)))
        start += count
    parts += [logits(engine, PlanRow(chunked, position, 1)) for position in range(start, 75)]
    close(torch.cat(parts), expected)
    assert engine.info.parameters == sum(p.numel() for p in gemma.parameters())
    assert engine.info.seed_reproducible


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 80, "intermediate": 50, "window": 7},
        {"heads": 2, "kv_heads": 1, "head_dim": 256, "hidden": 96, "window": 33, "pattern": 2},
        {"heads": 2, "kv_heads": 2, "head_dim": 16, "hidden": 32, "window": 5},
        {"heads": 4, "kv_heads": 4, "window": 512, "pattern": 6, "query_scale": 256},
    ],
    ids=str,
)
def test_geometries(shape: dict[str, int], tmp_path: Path) -> None:
    """Head sizes that native code runs, one that it does not, and windows shorter and longer than the text."""
    model = make_gemma(layers=3, vocab=50, **shape)
    model.save_pretrained(tmp_path)
    tokens = some_tokens(60, 50)
    close(logits(load(tmp_path), PlanRow(sequence(tokens, range(4)), 0, 60)), oracle(model, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_computation_is_near(gemma: Gemma3ForCausalLM, gemma_dir: Path, dtype: str) -> None:
    tokens = some_tokens(50, 96)
    ours = logits(load(gemma_dir, dtype=dtype), PlanRow(sequence(tokens, range(4)), 0, 50))
    expected = oracle(gemma, tokens)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().mean() < 0.05 * expected.std()


def test_the_embeddings_scale_is_rounded_to_the_weights_dtype(tmp_path: Path) -> None:
    make_gemma(hidden=96, layers=1).save_pretrained(tmp_path)
    assert load(tmp_path, dtype="float32").target.embedding_scale == pytest.approx(96**0.5, rel=1e-7)
    assert load(tmp_path, dtype="bfloat16").target.embedding_scale == 9.8125  # as Gemma 3 rounds it: 9.79796


def test_older_spellings(tmp_path: Path) -> None:
    """Before transformers 5: thetas and scaling at the top, layers by a pattern."""
    model = make_gemma(layers=4, pattern=2)
    model.save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        rope_theta=5000.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        rope_local_base_freq=100.0,
        sliding_window_pattern=2,
    )
    tokens = some_tokens(50, 96)
    close(logits(load(tmp_path), PlanRow(sequence(tokens, range(4)), 0, 50)), oracle(model, tokens))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_multimodal_checkpoint(prefix: str, tmp_path: Path) -> None:
    model = make_gemma(layers=2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("hidden_activation", "rms_norm_eps", "tie_word_embeddings"):  # published ones leave defaults out
        config.pop(key)
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    renamed["vision_tower.patch.weight"] = torch.zeros(3, 3)
    save_file(renamed, tmp_path / "model.safetensors")
    tokens = some_tokens(40, 96)
    close(logits(load(tmp_path), PlanRow(sequence(tokens, range(3)), 0, 40)), oracle(model, tokens))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_activation": "silu"}, "hidden_activation"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}}, "yarn"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4}}}, "factor"),
    ({"rope_parameters": {"sliding_attention": {"rope_theta": -1.0}}}, "rope_theta"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_served_is_refused(
    changes: dict[str, Any], message: str, gemma: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    gemma.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


def test_unknown_tensors_are_refused(gemma: Gemma3ForCausalLM, tmp_path: Path) -> None:
    gemma.save_pretrained(tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__sinks=torch.zeros(4))
    with pytest.raises(LoadError, match="sinks"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["vanilla", "dflash", "eagle3", "mtp"])
def test_drafting_changes_no_text(
    kind: str, gemma: Gemma3ForCausalLM, gemma_dir: Path, tmp_path: Path, prompts: list[tuple[int, ...]]
) -> None:
    """Greedy and seeded, at prompts shorter and longer than the window: with a drafter, without, and transformers'."""
    drafted = load(gemma_dir, save_gemma_drafter(tmp_path, gemma, kind), policy="fixed", prefill_chunk=11)
    plain = load(gemma_dir)
    chosen = [prompts[i] for i in (0, 5, 7, 9)]
    requests = [
        request(f"{name} {i}", prompt, 16, sampling, FIXED)
        for i, prompt in enumerate(chosen)
        for name, sampling in (("greedy", GREEDY), ("seeded", coupled(i)))
    ]
    ours, theirs = run(drafted, requests), run(plain, requests)
    assert any(delta.verified for result in ours.values() for delta in result.deltas)
    for name in ours:
        assert ours[name].tokens == theirs[name].tokens, name
    for i, prompt in enumerate(chosen):
        assert ours[f"greedy {i}"].tokens == generate(gemma, prompt, 16)


def test_drafted_blocks_are_the_papers(
    gemma: Gemma3ForCausalLM, gemma_dir: Path, tmp_path: Path, prompts: list[tuple[int, ...]]
) -> None:
    """DSpark's equations over this target's features, and over its embedding as the target reads it."""
    directory = save_gemma_drafter(tmp_path, gemma, "vanilla")
    engine = load(gemma_dir, directory, policy="fixed", prefill_chunk=11)
    judge = Judge(engine, Oracle(directory, gemma))
    run(engine, [request(str(i), p, 8, *MIX[i % len(MIX)]) for i, p in enumerate(prompts)])
    assert judge.judged >= 6
    assert max(judge.positions) > 64


def test_a_prefix_hit_and_a_full_pool_change_no_text(gemma_dir: Path, prompts: list[tuple[int, ...]]) -> None:
    """Pages that come back from the prefix cache, or anew after preemption, hold what windows want to see."""
    engine = load(gemma_dir, max_model_len=96, kv_memory=5 * 2**20 // 8)
    alone: Callable[[tuple[int, ...]], list[int]] = lambda prompt: text(load(gemma_dir), request("one", prompt, 20))
    expected = {i: alone(prompts[i]) for i in (6, 9)}
    for _ in range(2):
        results = run(engine, [request(f"{i} {j}", prompts[i], 20) for i in (6, 9) for j in range(3)])
        for name, result in results.items():
            assert result.tokens == expected[int(name.split()[0])], name
    assert results["9 0"].cached
