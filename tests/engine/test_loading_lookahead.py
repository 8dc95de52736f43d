"""Every corrupt or mismatched Eagle3 or MTP-1 checkpoint is refused with a LoadError that names the culprit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.errors import LoadError
from tests.engine.checkpoints import save_drafter
from tests.engine.helpers import load
from tests.engine.lookahead import save_eagle3, save_mtp
from tests.engine.test_loading import Edit, config, remove, tensor, truncate, write

IDS = (3, 90, 0, 41)
D2T = torch.tensor(IDS) - torch.arange(4)

SHARED_FAULTS: dict[str, tuple[Edit, str]] = {
    "no config": (remove("config.json"), "config.json is missing"),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing"),
    "bad JSON": (write("config.json", b"{"), "config.json cannot be read as JSON"),
    "truncated weights": (truncate, "model.safetensors is not a readable safetensors file"),
    "other vocabulary": (config(vocab_size=97), "vocab_size is 97, the target's is 96: made for another target"),
    "other width": (config(hidden_size=128), "hidden_size is 128, the target's is 64: made for another target"),
    "empty block": (config(block_size=0), "config.json: block_size must be positive, got 0"),
    "block of words": (config(block_size="5"), "block_size must be int, got '5'"),
    "unknown tensor": (tensor("layers__7__mlp__up_proj__weight", torch.ones(9)), "layers.7.mlp.up_proj.weight has no"),
    "another embedding": (tensor("embed_tokens__weight", torch.ones(96, 64)), "embed_tokens.weight differs"),
    "another head": (tensor("lm_head__weight", torch.ones(96, 64)), "lm_head.weight differs"),
}  # fmt: skip

EAGLE3_FAULTS: dict[str, tuple[Edit, str]] = {
    **SHARED_FAULTS,
    "neither block size nor unrolling": (config(ttt_length=None), "config.json: block_size is missing"),
    "final layer": (config(target_layer_ids=[0, 3]), r"target_layer_ids \[0, 3\] must lie in −1 … 2"),
    "unordered layers": (config(target_layer_ids=[2, 0]), "must increase"),
    "no layers": (config(target_layer_ids=[]), "target_layer_ids"),
    "more features": (config(target_layer_ids=[0, 1, 2]), r"fc.weight has shape \[64, 128\].*\[64, 192\]"),
    "two depths": (config(num_hidden_layers=2), "draft_num_hidden_layers 1 and num_hidden_layers 2 differ"),
    "missing tensor": (tensor("layers__0__hidden_norm__weight", None), "tensor layers.0.hidden_norm.weight is missing"),
    "narrow attention": (
        tensor("layers__0__self_attn__q_proj__weight", torch.ones(128, 64)),
        r"layers.0.self_attn.q_proj.weight has shape \[128, 64\], config.json implies \[128, 128\]",
    ),
    "a map without a vocabulary": (tensor("d2t", D2T), "tensor d2t has no place"),
}  # fmt: skip

REDUCED_FAULTS: dict[str, tuple[Edit, str]] = {
    "no map": (tensor("d2t", None), "tensor d2t is missing"),
    "short map": (tensor("d2t", D2T[:3].clone()), r"tensor d2t has shape \[3\], config.json implies \[4\]"),
    "a map of fractions": (tensor("d2t", D2T.float()), "tensor d2t is torch.float32; it must hold integers"),
    "an id twice": (tensor("d2t", torch.tensor([3, 2, 0, 38])), "d2t names an id twice"),
    "an id outside": (tensor("d2t", torch.tensor([3, 89, -2, 93])), "d2t names an id twice, or one outside"),
    "maps that disagree": (tensor("t2d", torch.arange(96) < 4), "tensors d2t and t2d disagree"),
    "short marks": (tensor("t2d", torch.ones(95, dtype=torch.bool)), r"tensor t2d has shape \[95\]"),
    "vocabulary too large": (config(draft_vocab_size=97), r"draft_vocab_size 97 must lie in 1 … 96"),
    "empty vocabulary": (config(draft_vocab_size=0), "draft_vocab_size 0 must lie in"),
    "vocabulary of words": (config(draft_vocab_size="4"), "draft_vocab_size must be int"),
    "head of the whole vocabulary": (
        tensor("lm_head__weight", torch.ones(96, 64)),
        r"lm_head.weight has shape \[96, 64\], config.json implies \[4, 64\]",
    ),
    "another embedding": (tensor("embed_tokens__weight", torch.ones(96, 64)), "embed_tokens.weight differs"),
}  # fmt: skip

MTP_FAULTS: dict[str, tuple[Edit, str]] = {
    **SHARED_FAULTS,
    "two layers": (config(num_hidden_layers=2), "num_hidden_layers is 2; an MTP-1 module has 1"),
    "missing tensor": (tensor("mtp__pre_fc_norm_hidden__weight", None), "mtp.pre_fc_norm_hidden.weight is missing"),
    "missing layer": (tensor("mtp__layers__0__mlp__down_proj__weight", None), "0.mlp.down_proj.weight is missing"),
    "narrow fc": (tensor("mtp__fc__weight", torch.ones(64, 64)), r"mtp.fc.weight has shape \[64, 64\].*\[64, 128\]"),
}  # fmt: skip


def refuse(spoil: Edit, message: str, directory: Path, target_dir: Path) -> None:
    spoil(directory)
    with pytest.raises(LoadError, match=message):
        load(target_dir, directory)


@pytest.mark.parametrize("fault", EAGLE3_FAULTS)
def test_broken_eagle3(fault: str, target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path) -> None:
    refuse(*EAGLE3_FAULTS[fault], save_eagle3(tmp_path / "broken", hf_target), target_dir)


@pytest.mark.parametrize("fault", REDUCED_FAULTS)
def test_broken_draft_vocabularies(fault: str, target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path) -> None:
    refuse(*REDUCED_FAULTS[fault], save_eagle3(tmp_path / "broken", hf_target, draft_ids=IDS), target_dir)


@pytest.mark.parametrize("fault", [fault for fault in REDUCED_FAULTS if fault != "another embedding"])
def test_broken_draft_vocabularies_of_dspark(
    fault: str, target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    refuse(*REDUCED_FAULTS[fault], save_drafter(tmp_path / "broken", hf_target, draft_ids=IDS), target_dir)


def test_a_whole_w2_over_a_reduced_draft_vocabulary(
    target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    message = r"markov_w2.weight has shape \[96, 16\], config.json implies \[4, 16\]"
    whole = tensor("markov_head__markov_w2__weight", torch.ones(96, 16))
    refuse(whole, message, save_drafter(tmp_path / "broken", hf_target, draft_ids=IDS), target_dir)


@pytest.mark.parametrize("fault", MTP_FAULTS)
def test_broken_mtp(fault: str, target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path) -> None:
    refuse(*MTP_FAULTS[fault], save_mtp(tmp_path / "broken", hf_target), target_dir)


def test_the_marks_of_a_draft_vocabulary_may_be_left_out(
    target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    directory = save_eagle3(tmp_path / "eagle3", hf_target, draft_ids=IDS)
    tensor("t2d", None)(directory)
    assert load(target_dir, directory).info.drafter == "eagle3"


def test_block_size_goes_before_the_unrolling(target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path) -> None:
    directory = save_eagle3(tmp_path / "eagle3", hf_target, block=5)
    assert load(target_dir, directory).info.block_size == 5
    config(block_size=3)(directory)
    assert load(target_dir, directory).info.block_size == 3
    shutil.rmtree(directory)
    assert load(target_dir, save_mtp(tmp_path / "mtp", hf_target)).info.block_size == 1
