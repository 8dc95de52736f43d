"""The target's logits equal transformers', from every kind of file; whole, in chunks and token by token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.batch import build_batch
from engine.engine import Engine
from engine.types import EndConditions, PlanRow, Request, Sequence, StepPlan, Verification
from tests.engine.checkpoints import edit_config, make_target, save_target
from tests.engine.helpers import GREEDY, generate, load, request, run

TOLERANCE = 1e-4


def sequence(tokens: list[int], pages: Iterable[int]) -> Sequence:
    made = Request("probe", tuple(tokens), EndConditions(1))
    return Sequence(made, 0, Verification.COUPLED, tokens, 0, pages=array("q", pages), prompt_length=len(tokens))


def logits(engine: Engine, *rows: PlanRow) -> torch.Tensor:
    """Logits of every row of a batch laid out by hand."""
    batch = build_batch(StepPlan(rows), None, torch.device("cpu"))
    everything = torch.arange(len(batch.input_ids))
    return engine.target.forward(batch._replace(logit_rows=everything), ())[0].clone()


def oracle(model: Qwen3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def some_tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_prefill_chunked_prefill_and_decode(hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    engine = load(target_dir)
    tokens = some_tokens(75, 96)
    expected = oracle(hf_target, tokens)
    whole = sequence(tokens, range(5))
    close(logits(engine, PlanRow(whole, 0, 75)), expected)
    chunked = sequence(tokens, (9, 7, 11, 3 + 9, 5))
    parts, start = [], 0
    for count in (1, 15, 2, 30, 17):
        parts.append(logits(engine, PlanRow(chunked, start, count)))
        start += count
    parts += [logits(engine, PlanRow(chunked, position, 1)) for position in range(start, 75)]
    close(torch.cat(parts), expected)


def test_rows_of_many_sequences_in_one_batch(hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    engine = load(target_dir)
    texts = [some_tokens(length, 96, length) for length in (3, 40, 17, 64)]
    sequences = [sequence(text, range(10 * i, 10 * i + 4)) for i, text in enumerate(texts)]
    for one in sequences:
        one.kv_length = len(one.tokens) // 2
        if one.kv_length:
            logits(engine, PlanRow(one, 0, one.kv_length))
    rows = [PlanRow(one, one.kv_length, len(one.tokens) - one.kv_length) for one in sequences]
    expected = [oracle(hf_target, one.tokens)[one.kv_length :] for one in sequences]
    close(logits(engine, *rows), torch.cat(expected))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", ["500GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_of_every_kind(tmp_path: Path, tied: bool, shards: str, dtype: torch.dtype) -> None:
    model = make_target(layers=2, tied=tied, seed=3).to(dtype)
    save_target(tmp_path, model, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "60KB")
    # Read again: Module.to() would round the rope's buffers too.
    reread = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    engine = load(tmp_path, dtype="float32")
    tokens = some_tokens(20, 96)
    close(logits(engine, PlanRow(sequence(tokens, range(2)), 0, 20)), oracle(reread, tokens))
    assert engine.info.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("multiplies_bfloat16", [True, False])
def test_auto_takes_what_the_processor_multiplies(
    tmp_path: Path, dtype: torch.dtype, multiplies_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.models.families.HAS_DOT", multiplies_bfloat16)
    save_target(tmp_path, make_target(layers=1).to(dtype))
    half = dtype == torch.bfloat16 and multiplies_bfloat16
    assert load(tmp_path).info.dtype == ("bfloat16" if half else "float32")


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters", "rope_scaling null"])
def test_rope_spellings(tmp_path: Path, spelling: str) -> None:
    """transformers 5 nests theta in rope_parameters; older files have it at the top, some with a null rope_scaling."""
    model = make_target(layers=2)
    save_target(tmp_path, model)
    if spelling != "rope_parameters":
        edit_config(tmp_path, rope_parameters=None, rope_theta=5000.0, dtype=None, torch_dtype="float32")
    if spelling == "rope_scaling null":
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"rope_theta"', '"rope_scaling": null, "rope_theta"'))
    tokens = some_tokens(50, 96)
    close(logits(load(tmp_path), PlanRow(sequence(tokens, range(4)), 0, 50)), oracle(model, tokens))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (6, 1, 32), (2, 1, 16), (3, 3, 64)])
def test_head_geometries(tmp_path: Path, heads: int, kv_heads: int, head_dim: int) -> None:
    model = make_target(
        layers=2, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=48, intermediate=80, vocab=37
    )
    save_target(tmp_path, model)
    tokens = some_tokens(35, 37)
    close(logits(load(tmp_path), PlanRow(sequence(tokens, range(3)), 0, 35)), oracle(model, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_computation_is_near(hf_target: Qwen3ForCausalLM, target_dir: Path, dtype: str) -> None:
    tokens = some_tokens(20, 96)
    ours = logits(load(target_dir, dtype=dtype), PlanRow(sequence(tokens, range(2)), 0, 20))
    expected = oracle(hf_target, tokens)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().mean() < 0.05 * expected.std()


def test_captured_features_are_the_layers_outputs(hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    """Ids index layers from 0; −1 is the embedding."""
    engine = load(target_dir)
    tokens = some_tokens(20, 96)
    batch = build_batch(StepPlan((PlanRow(sequence(tokens, range(2)), 0, 20),)), None, torch.device("cpu"))
    features = engine.target.forward(batch, (-1, 0, 2))[1]
    with torch.inference_mode():
        hidden = hf_target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    assert features is not None
    close(features, torch.cat([hidden[i + 1][0] for i in (-1, 0, 2)], -1))


def test_greedy_texts(hf_target: Qwen3ForCausalLM, target_dir: Path, prompts: list[tuple[int, ...]]) -> None:
    results = run(load(target_dir), [request(str(i), prompt, 20, GREEDY) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert results[str(i)].tokens == generate(hf_target, prompt, 20), len(prompt)
