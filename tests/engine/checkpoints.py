"""Tiny random checkpoints in the real formats, written by transformers (targets) or by tensor name (drafters)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

HEADS = ("none", "vanilla", "gated", "rnn")


def make_target(
    *,
    vocab: int = 96,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 96,
    positions: int = 512,
    tied: bool = True,
    scale: float = 4.0,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A random Qwen3 whose next token depends strongly on what came before (`scale` widens its matrices).

    Norm weights are random too: a test with ones would not notice a norm left out.
    """
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.02 * scale if parameter.dim() > 1 else 1 + 0.2 * noise)
    return model


def save_target(directory: Path, model: Qwen3ForCausalLM, **options: Any) -> Path:
    """Write with transformers; `options` go to save_pretrained (max_shard_size, …)."""
    model.save_pretrained(directory, **options)
    return directory


def save_drafter(
    directory: Path,
    target: Qwen3ForCausalLM,
    *,
    head: str = "vanilla",
    confidence: bool = True,
    with_markov: bool = True,
    rank: int = 16,
    block: int = 5,
    layers: int = 2,
    feature_layers: tuple[int, ...] = (0, 2),
    copies: bool = False,
    draft_ids: tuple[int, ...] = (),
    own_head: bool = True,
    scale: float = 0.2,
    seed: int = 1,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a DSpark drafter for `target` under the published tensor names and config keys.

    Args:
        head: none (DFlash), vanilla, gated or rnn.
        copies: whether to add copies of the target's embedding and lm_head, as published checkpoints do.
        draft_ids: a reduced draft vocabulary, in draft order; empty for none.
        own_head: whether that comes with an lm_head of its own.
        changes: config.json keys to replace, None to leave one out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    base = target.config
    config: dict[str, Any] = json.loads(base.to_json_string())
    config.update(
        architectures=["Qwen3DSparkModel"],
        num_hidden_layers=layers,
        layer_types=["full_attention"] * layers,
        block_size=block,
        target_layer_ids=list(feature_layers),
        mask_token_id=base.vocab_size - 1,
        markov_rank=0 if head == "none" else rank,
        markov_head_type="vanilla" if head == "none" else head,
        enable_confidence_head=confidence,
        confidence_head_with_markov=with_markov and head != "none",
        num_anchors=8,
    )
    if draft_ids:
        config["draft_vocab_size"] = len(draft_ids)
    for key, value in (changes or {}).items():
        config[key] = value
        if value is None:
            del config[key]
    (directory / "config.json").write_text(json.dumps(config))
    tensors = drafter_tensors(
        target, head, confidence, with_markov and head != "none", rank, layers, len(feature_layers), scale, seed
    )
    if draft_ids:
        ids = torch.tensor(draft_ids)
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(base.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        if "markov_head.markov_w2.weight" in tensors:
            tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][ids]
        if own_head:
            noise = torch.randn(len(ids), base.hidden_size, generator=torch.Generator().manual_seed(seed))
            tensors["lm_head.weight"] = noise * scale
    if copies:
        tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.detach().clone()
        tensors.setdefault("lm_head.weight", target.lm_head.weight.detach().clone())
    save_file(tensors, directory / "model.safetensors")
    return directory


def drafter_tensors(
    target: Qwen3ForCausalLM,
    head: str,
    confidence: bool,
    with_markov: bool,
    rank: int,
    layers: int,
    features: int,
    scale: float,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Random weights by published name."""
    c = target.config
    hidden, vocab, width = c.hidden_size, c.vocab_size, c.head_dim
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    tensors = {
        "fc.weight": matrix(hidden, features * hidden),
        "hidden_norm.weight": norm(hidden),
        "norm.weight": norm(hidden),
    }
    for i in range(layers):
        p = f"layers.{i}"
        tensors[f"{p}.input_layernorm.weight"] = norm(hidden)
        tensors[f"{p}.post_attention_layernorm.weight"] = norm(hidden)
        tensors[f"{p}.self_attn.q_proj.weight"] = matrix(c.num_attention_heads * width, hidden)
        tensors[f"{p}.self_attn.k_proj.weight"] = matrix(c.num_key_value_heads * width, hidden)
        tensors[f"{p}.self_attn.v_proj.weight"] = matrix(c.num_key_value_heads * width, hidden)
        tensors[f"{p}.self_attn.o_proj.weight"] = matrix(hidden, c.num_attention_heads * width)
        tensors[f"{p}.self_attn.q_norm.weight"] = norm(width)
        tensors[f"{p}.self_attn.k_norm.weight"] = norm(width)
        tensors[f"{p}.mlp.gate_proj.weight"] = matrix(c.intermediate_size, hidden)
        tensors[f"{p}.mlp.up_proj.weight"] = matrix(c.intermediate_size, hidden)
        tensors[f"{p}.mlp.down_proj.weight"] = matrix(hidden, c.intermediate_size)
    if head != "none":
        tensors["markov_head.markov_w1.weight"] = matrix(vocab, rank) * 3
        tensors["markov_head.markov_w2.weight"] = matrix(vocab, rank) * 3
    if head == "gated":
        tensors["markov_head.gate_proj.weight"] = matrix(rank, hidden + rank)
        tensors["markov_head.gate_proj.bias"] = matrix(rank)
    if head == "rnn":
        tensors["markov_head.joint_proj.weight"] = matrix(3 * rank, 2 * rank + hidden)
        tensors["markov_head.joint_proj.bias"] = matrix(3 * rank)
    if confidence:
        tensors["confidence_head.proj.weight"] = matrix(1, hidden + (rank if with_markov else 0))
        tensors["confidence_head.proj.bias"] = matrix(1)
    return tensors


def edit_config(directory: Path, **changes: Any) -> None:
    """Replace keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value
        if value is None:
            del config[key]
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of model.safetensors (dots in names come as double underscores); None removes one."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})
