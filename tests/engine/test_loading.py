"""Every corrupt or mismatched checkpoint is refused with a LoadError that names the culprit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from engine.errors import LoadError
from tests.engine.checkpoints import edit_config, edit_tensors, make_target, save_drafter, save_target
from tests.engine.helpers import load

Drafters = Callable[..., Path]
Edit = Callable[[Path], None]


def config(**changes: object) -> Edit:
    return lambda directory: edit_config(directory, **changes)


def tensor(name: str, value: torch.Tensor | None) -> Edit:
    return lambda directory: edit_tensors(directory, **{name: value})


def write(name: str, content: bytes) -> Edit:
    return lambda directory: (directory / name).write_bytes(content) and None


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove(name: str) -> Edit:
    return lambda directory: (directory / name).unlink()


TARGET_FAULTS: dict[str, tuple[Edit, str]] = {
    "no config": (remove("config.json"), "config.json is missing"),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing"),
    "bad JSON": (write("config.json", b'{"vocab_size": 96,'), "config.json cannot be read as JSON"),
    "not UTF-8": (write("config.json", b"\xff\xfe\x00"), "config.json cannot be read as JSON"),
    "not an object": (write("config.json", b"[1, 2]"), "config.json must hold a JSON object"),
    "truncated weights": (truncate, "model.safetensors is not a readable safetensors file"),
    "weights that are text": (write("model.safetensors", b"version https://git-lfs"), "not a readable safetensors"),
    "an index without a map": (write("model.safetensors.index.json", b"{}"), "weight_map"),
    "an index of absent shards": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "model-00001-of-00002.safetensors is missing",
    ),
    "wrong architecture": (config(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM is not served"),
    "no architecture": (config(architectures=None), "architecture none"),
    "missing key": (config(num_hidden_layers=None), "num_hidden_layers is missing"),
    "mistyped key": (config(hidden_size="64"), "hidden_size must be int"),
    "zero": (config(vocab_size=0), "vocab_size must be positive"),
    "heads do not divide": (config(num_key_value_heads=3), "num_key_value_heads"),
    "rope type": (config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "'yarn' is not served"),
    "attention bias": (config(attention_bias=True), "attention_bias"),
    "sliding window": (config(use_sliding_window=True), "sliding window"),
    "activation": (config(hidden_act="gelu"), "'gelu'"),
    "fewer layers": (config(num_hidden_layers=3), r"tensor model.layers.3\..* has no place"),
    "more layers": (config(num_hidden_layers=5), r"tensor model.layers.4\..* is missing"),
    "wrong width": (config(intermediate_size=128), "tensor model.layers.0.mlp.gate_proj.weight has shape"),
    "missing tensor": (tensor("model__layers__2__mlp__up_proj__weight", None), "2.mlp.up_proj.weight is missing"),
    "wrong shape": (tensor("model__norm__weight", torch.ones(65)), r"model.norm.weight has shape \[65\].*\[64\]"),
    "integers": (tensor("model__norm__weight", torch.ones(64, dtype=torch.int32)), "model.norm.weight is torch.int32"),
    "unknown tensor": (tensor("model__layers__0__self_attn__q_proj__bias", torch.ones(9)), "q_proj.bias has no place"),
    "untied without a head": (config(tie_word_embeddings=False), "lm_head.weight is missing"),
    "tied with another head": (tensor("lm_head__weight", torch.ones(96, 64)), "lm_head.weight differs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TARGET_FAULTS)
def test_broken_targets(fault: str, target_dir: Path, tmp_path: Path) -> None:
    spoil, message = TARGET_FAULTS[fault]
    broken = tmp_path / "broken"
    shutil.copytree(target_dir, broken)
    spoil(broken)
    with pytest.raises(LoadError, match=message):
        load(broken)


DRAFTER_FAULTS: dict[str, tuple[Edit, str]] = {
    "wrong architecture": (config(architectures=["Qwen3MedusaModel"]), "Qwen3MedusaModel is not served"),
    "target as drafter": (config(architectures=["Qwen3ForCausalLM"]), "drafter architecture Qwen3ForCausalLM"),
    "other vocabulary": (config(vocab_size=97), "vocab_size is 97, the target's is 96: made for another target"),
    "other width": (config(hidden_size=128), "hidden_size is 128, the target's is 64: made for another target"),
    "final layer": (config(target_layer_ids=[0, 3]), r"target_layer_ids \[0, 3\] must lie in −1 … 2"),
    "layer below the embedding": (config(target_layer_ids=[-2, 0]), "target_layer_ids"),
    "no layers": (config(target_layer_ids=[]), "target_layer_ids"),
    "unordered layers": (config(target_layer_ids=[2, 0]), "must increase"),
    "layers that are words": (config(target_layer_ids=["a", "b"]), "target_layer_ids"),
    "no block size": (config(block_size=None), "block_size is missing"),
    "empty block": (config(block_size=0), "block_size must be positive"),
    "mask token": (config(mask_token_id=96), "mask_token_id 96"),
    "head type": (config(markov_head_type="transformer"), "'transformer' is not one of vanilla, gated, rnn"),
    "negative rank": (config(markov_rank=-1), "markov_rank"),
    "rank of another": (config(markov_rank=8), "markov_head.markov_w1.weight has shape"),
    "confidence needs Markov": (config(markov_rank=0), "confidence_head_with_markov needs a Markov head"),
    "confidence width": (config(confidence_head_with_markov=False), "confidence_head.proj.weight has shape"),
    "confidence not announced": (config(enable_confidence_head=False), "confidence_head.proj.* has no place"),
    "gate not there": (config(markov_head_type="gated"), "markov_head.gate_proj.weight is missing"),
    "joint not there": (config(markov_head_type="rnn"), "markov_head.joint_proj.weight is missing"),
    "one layer too many": (config(num_hidden_layers=1), r"tensor layers.1\..* has no place"),
    "more features": (config(target_layer_ids=[0, 1, 2]), r"fc.weight has shape \[64, 128\].*\[64, 192\]"),
    "missing tensor": (tensor("markov_head__markov_w2__weight", None), "markov_head.markov_w2.weight is missing"),
    "missing confidence": (tensor("confidence_head__proj__bias", None), "confidence_head.proj.bias is missing"),
    "missing fc": (tensor("fc__weight", None), "fc.weight is missing"),
    "another embedding": (tensor("embed_tokens__weight", torch.ones(96, 64)), "embed_tokens.weight differs"),
    "another head": (tensor("lm_head__weight", torch.ones(96, 64)), "lm_head.weight differs"),
    "an embedding too small": (tensor("embed_tokens__weight", torch.ones(90, 64)), "embed_tokens.weight has shape"),
    "truncated weights": (truncate, "not a readable safetensors file"),
    "bad JSON": (write("config.json", b"{"), "cannot be read as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DRAFTER_FAULTS)
def test_broken_drafters(fault: str, target_dir: Path, drafter_dir: Drafters, tmp_path: Path) -> None:
    spoil, message = DRAFTER_FAULTS[fault]
    broken = tmp_path / "broken"
    shutil.copytree(drafter_dir(), broken)
    spoil(broken)
    with pytest.raises(LoadError, match=message):
        load(target_dir, broken)


def test_a_drafter_for_another_target_of_the_same_size(target_dir: Path, tmp_path: Path) -> None:
    """Only the copies of the target's tensors can tell."""
    other = make_target(seed=9)
    save_drafter(tmp_path / "other", other, copies=True)
    with pytest.raises(LoadError, match=r"embed_tokens\.weight differs from the target's"):
        load(target_dir, tmp_path / "other")


def test_copies_compare_in_the_serving_dtype(tmp_path: Path, hf_target: Qwen3ForCausalLM) -> None:
    """A drafter published in bfloat16 carries rounded copies of a bfloat16 target: still its own."""
    half = make_target().to(torch.bfloat16)
    save_target(tmp_path / "target", half)
    save_drafter(tmp_path / "drafter", half.float(), copies=True)
    path = tmp_path / "drafter" / "model.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in load_file(path).items()}, path)
    for dtype in ("auto", "bfloat16"):
        assert load(tmp_path / "target", tmp_path / "drafter", dtype=dtype).info.drafter == "dspark"


@pytest.mark.parametrize(("name", "message"), [
    ("/no/such/place", "no directory"), ("./nothing", "no directory"), ("nothing", "no hub id"), ("a/b/c", "no hub id"),
])  # fmt: skip
def test_names_that_are_neither_directory_nor_hub_id(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load(Path(name))


def test_a_file_is_not_a_directory(target_dir: Path) -> None:
    with pytest.raises(LoadError, match="is a file; give the directory"):
        load(target_dir / "config.json")


@pytest.mark.parametrize(("options", "message"), [
    ({"kv_memory": 1000}, "kv_memory 1000 bytes holds 0 pages"),
    ({"kv_memory": 4 * 32768, "max_model_len": 200}, "max_model_len 200 needs"),
    ({"max_model_len": 513}, "above the model's 512 positions"),
    ({"device": "quantum"}, "device 'quantum'"),
])  # fmt: skip
def test_settings_that_do_not_fit(target_dir: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load(target_dir, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_device(target_dir: Path) -> None:
    with pytest.raises(LoadError, match="use --device cpu"):
        load(target_dir, device="cuda")


def test_the_context_shrinks_to_what_memory_holds(target_dir: Path) -> None:
    engine = load(target_dir, kv_memory=5 * 32768, max_model_len=None)
    assert (engine.pool.total, engine.info.max_model_len) == (5, 80)


@pytest.mark.parametrize(("content", "expected"), [
    ({"eos_token_id": [3, 5]}, (3, 5)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": None}, (2,)), (None, (2,)),
])  # fmt: skip
def test_end_tokens(
    tmp_path: Path, target_dir: Path, content: dict[str, object] | None, expected: tuple[int, ...]
) -> None:
    """generation_config.json goes before config.json."""
    directory = tmp_path / "copy"
    shutil.copytree(target_dir, directory)
    edit_config(directory, eos_token_id=2)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if content is not None:
        (directory / "generation_config.json").write_text(json.dumps(content))
    assert load(directory).info.eos_ids == expected


def test_the_threads_of_torch_leave_the_cores_to_native_code(target_dir: Path) -> None:
    load(target_dir, threads=2)
    assert torch.get_num_threads() == 1
