"""Tiny random Gemma 3 checkpoints, written by transformers, and drafters for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.engine.checkpoints import edit_config, save_drafter
from tests.engine.lookahead import save_eagle3, save_mtp

DRAFTER_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def make_gemma(
    *,
    vocab: int = 96,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 1,
    head_dim: int = 32,
    intermediate: int = 96,
    window: int = 20,
    pattern: int = 3,
    query_scale: int = 24,
    rope: dict[str, Any] | None = None,
    scale: float = 4.0,
    seed: int = 0,
) -> Gemma3ForCausalLM:
    """A random decoder whose next token depends strongly on what came before; every `pattern`-th layer sees it all.

    Norm weights are random too: they stand for 1 + w, and a test with zeros would not notice a norm left out.
    """
    config = Gemma3TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        sliding_window=window,
        layer_types=["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        query_pre_attn_scalar=query_scale,
        rope_parameters=rope
        or {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    generator = torch.Generator().manual_seed(seed)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.02 * scale if parameter.dim() > 1 else 0.2 * noise)
    return model


def save_gemma_drafter(directory: Path, target: Gemma3ForCausalLM, kind: str) -> Path:
    """A drafter of Qwen3-like layers: a DSpark head's name, dflash, eagle3 or mtp."""
    if kind == "eagle3":
        save_eagle3(directory, target)
    elif kind == "mtp":
        save_mtp(directory, target, block=3)
    elif kind == "dflash":
        save_drafter(directory, target, head="none", confidence=False)
    else:
        save_drafter(directory, target, head=kind)
    edit_config(directory, rope_parameters=DRAFTER_ROPE)
    return directory
