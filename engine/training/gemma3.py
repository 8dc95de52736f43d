"""A plain Gemma 3 decoder to train drafters for: frozen, whole sequences from position 0, no caches.

The sizes are read as the engine reads them (`engine.models.gemma3`). Beside Qwen3: norms multiply by 1 + w and close
each half of a layer too, the gate is GELU by its tanh formula, the embedding comes times √hidden, and most layers
see a sliding window, with a rope of their own. The residual stream stays float32: Gemma's grows large.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.gemma3 import SLIDING, Gemma3Config, Rope, embedding_scale, find_prefix, read_gemma3
from engine.models.loader import Checkpoint
from engine.training.model import ModelConfig, Qwen3, apply_rope, rope_table


class GemmaNorm(nn.Module):
    """Root-mean-square norm over the last axis in float32, times 1 + w."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size] float32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class GemmaAttention(nn.Module):
    """Grouped causal attention of one kind of layer."""

    def __init__(self, config: Gemma3Config, sliding: bool) -> None:
        super().__init__()
        g, self.scale = config.geometry, config.score_scale
        self.heads, self.kv_heads, self.head_dim = g.heads, g.kv_heads, g.head_dim
        self.window = config.window if sliding else 0
        width, attention = g.hidden_size, g.heads * g.head_dim
        self.q_proj = nn.Linear(width, attention, bias=False)
        self.k_proj = nn.Linear(width, g.kv_width, bias=False)
        self.v_proj = nn.Linear(width, g.kv_width, bias=False)
        self.o_proj = nn.Linear(attention, width, bias=False)
        self.q_norm, self.k_norm = GemmaNorm(g.head_dim, g.eps), GemmaNorm(g.head_dim, g.eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        mixed = self.mix(apply_rope(q, *rope).to(v.dtype), apply_rope(k, *rope).to(v.dtype), v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention, [B, heads, T, head_dim]; a sliding layer's rows see `window` positions, own included."""
        length, mask = q.shape[2], None
        if 0 < self.window < length:
            places = torch.arange(length, device=q.device)
            behind = places[:, None] - places
            mask = (behind >= 0) & (behind < self.window)
        grouped = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )


class GemmaMLP(nn.Module):
    """GELU-gated."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class GemmaLayer(nn.Module):
    """A decoder layer of one kind; parameters have the checkpoint's names."""

    def __init__(self, config: Gemma3Config, sliding: bool) -> None:
        super().__init__()
        g = config.geometry
        self.self_attn = GemmaAttention(config, sliding)
        self.mlp = GemmaMLP(g.hidden_size, g.intermediate_size)
        self.input_layernorm = GemmaNorm(g.hidden_size, g.eps)
        self.post_attention_layernorm = GemmaNorm(g.hidden_size, g.eps)
        self.pre_feedforward_layernorm = GemmaNorm(g.hidden_size, g.eps)
        self.post_feedforward_layernorm = GemmaNorm(g.hidden_size, g.eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, width] float32 -> [B, T, width] float32."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope))
        out: Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return out


class GemmaDecoder(nn.Module):
    """The stack below the vocabulary head."""

    def __init__(self, config: Gemma3Config, scale: float) -> None:
        super().__init__()
        g = config.geometry
        self.text, self.embedding_scale = config, scale
        self.embed_tokens = nn.Embedding(g.vocab_size, g.hidden_size)
        self.layers = nn.ModuleList(GemmaLayer(config, kind == SLIDING) for kind in config.kinds)
        self.norm = GemmaNorm(g.hidden_size, g.eps)

    def states(self, tokens: Tensor) -> Iterator[Tensor]:
        """tokens [B, T] -> the residual stream [B, T, D]: as it enters the first layer, then after each layer."""
        g = self.text.geometry
        places = torch.arange(tokens.shape[1], device=tokens.device)
        ropes = [
            rope_table(places / rope.factor, g.head_dim, rope.theta)
            for rope in (Rope(g.rope_theta, g.rope_factor), self.text.local_rope)
        ]
        x = self.embed_tokens(tokens).float() * self.embedding_scale
        yield x
        for layer, kind in zip(self.layers, self.text.kinds, strict=True):
            x = layer(x, ropes[kind == SLIDING])
            yield x


class Gemma3(nn.Module):
    """Gemma3ForCausalLM, or the text part of Gemma3ForConditionalGeneration.

    `config` holds what drafters take from the target: its sizes, and the rope of its full layers.

    Args:
        scale: of the embedding's rows.
    """

    def __init__(self, config: Gemma3Config, scale: float) -> None:
        super().__init__()
        g = config.geometry
        self.config = ModelConfig(
            vocab_size=g.vocab_size,
            hidden_size=g.hidden_size,
            num_hidden_layers=g.layers,
            num_attention_heads=g.heads,
            num_key_value_heads=g.kv_heads,
            head_dim=g.head_dim,
            intermediate_size=g.intermediate_size,
            rms_norm_eps=g.eps,
            rope_theta=g.rope_theta,
            max_position_embeddings=g.max_positions,
        )
        self.model = GemmaDecoder(config, scale)
        self.lm_head = None if g.tied else nn.Linear(g.hidden_size, g.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The vocabulary head [V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


Target = Qwen3 | Gemma3  # what drafters can be trained for


def read_gemma3_target(folder: Path, raw: dict[str, Any]) -> Gemma3:
    """The served target in float32, frozen, in evaluation mode.

    Args:
        raw: its config.json.

    Raises:
        LoadError: a key or tensor is missing or of the wrong kind; names it.
    """
    config, checkpoint = read_gemma3(raw, folder), Checkpoint(folder)
    g, prefix = config.geometry, find_prefix(checkpoint)
    stored = checkpoint.take(f"{prefix}embed_tokens.weight", (g.vocab_size, g.hidden_size))
    scale = embedding_scale(g.hidden_size, stored.dtype)
    with torch.device("meta"):
        model = Gemma3(config, scale)
    tensors = {}
    for name, weight in model.named_parameters():
        place = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        tensors[name] = checkpoint.take(place, tuple(weight.shape), torch.float32)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()
