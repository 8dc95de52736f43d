"""A tiny random target and token files for training tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.training.export import read_target, write_target
from engine.training.frozen import Frozen
from engine.training.model import ModelConfig, Qwen3
from engine.training.plan import Plan, load_plan
from engine.training.trainable import find

SIZES = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position_embeddings=512,
)


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target directory that both training and the engine read."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = Qwen3(SIZES)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("tiny")
    write_target(folder, SIZES, model.state_dict())
    return folder


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 tokens in documents that end with token 0."""
    tokens = np.random.default_rng(5).integers(1, 96, 5000).astype(np.uint16)
    tokens[::61] = 0
    path = tmp_path_factory.mktemp("tokens") / "train.npz"
    np.savez(path, all=tokens)
    return path


@pytest.fixture
def make_plan(tiny_target: Path, token_file: Path, tmp_path: Path) -> Callable[..., Plan]:
    """`make_plan("run.steps=4", drafter="dflash")`: a small run in fp32 on one thread."""

    def make(*changes: str, drafter: str = "dspark", out: str = "run") -> Plan:
        assignments = [
            f"drafter={drafter}",
            f"target={tiny_target}",
            f"out={tmp_path / out}",
            f"data.sources=['{token_file}']",
            "data.length=64",
            "data.long=128",
            "data.batch_tokens=256",
            "run.steps=4",
            "run.precision=fp32",
            "run.device=cpu",
            "run.log_every=1",
            "model.anchors=16",
            "optim.warmup=2",
            *changes,
        ]
        if drafter == "dspark":
            assignments.insert(0, "model.markov_rank=8")
        return load_plan(None, assignments)

    return make


def weights(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's weights."""
    newest = sorted((folder / "states").glob("step-*"))[-1]
    return torch.load(newest / "state.pt", weights_only=True)["model"]


@pytest.fixture(scope="session")
def words(tiny_target: Path) -> Path:
    """The tiny target's tokenizer: token k is the word `wk`. Returns the target."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tiny_target / "tokenizer.json"))
    return tiny_target


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts in two domains."""
    rng = np.random.default_rng(2)
    lines = []
    for i in range(12):
        text = " ".join(f"w{t}" for t in rng.integers(1, 96, 6 + i))
        lines.append(json.dumps({"prompt": text, "domain": ("code", "prose")[i % 2]}) + "\n")
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_drafter(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained DSpark drafter whose confidences vary."""
    torch.manual_seed(4)
    kind = find("dspark")
    model = kind(kind.Options(markov_rank=8, block_size=4), Frozen(read_target(tiny_target), ()).shared)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" not in name and weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * (0.3 if "confidence" in name else 0.05))
    folder = tmp_path_factory.mktemp("drafters") / "tiny"
    model.export(folder)
    return folder
