"""A plain Qwen3 for training; parameter names map one to one to the public checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Qwen3 decoder; the defaults are those of the embedded model."""

    vocab_size: int = 4096
    hidden_size: int = 320
    num_hidden_layers: int = 10
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 832
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100000.0
    max_position_embeddings: int = 4096


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32, cast back, then scaled."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], same dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim] of half-split rotary embedding at integer positions."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.float()[..., None] * inverse.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., head_dim] by tables that broadcast against it."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain grouped attention; q [B, H, Tq, d], k and v [B, G, Tk, d], mask [..., Tq, Tk].

    On a CPU the fused kernel's backward pass is twice as slow as these batched products.
    """
    rows, groups = q.shape[0], k.shape[1]
    share, length, size = q.shape[1] // groups, q.shape[2], q.shape[3]
    flat = q.reshape(rows, groups, share * length, size)
    scores = (flat @ k.transpose(-1, -2)).float() * size**-0.5
    scores = scores.unflatten(2, (share, length)).masked_fill(~mask.unsqueeze(-3), -1e30)
    weights = torch.softmax(scores, -1).to(v.dtype).flatten(2, 3)
    return (weights @ v).view(rows, groups * share, length, size)


class Attention(nn.Module):
    """Grouped-query attention with per-head q/k norms before rope."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, width = config.head_dim, config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, width] -> rotated queries [B, heads, T, head_dim]."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)))
        return apply_rope(q.transpose(1, 2), *rope)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, width] -> rotated keys and values, each [B, kv_heads, T, head_dim]."""
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return apply_rope(k.transpose(1, 2), *rope), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention and output projection; causal when mask is None. Returns [B, T, width]."""
        if mask is not None:
            mixed = mix(q, k, v, mask)
        else:
            length = q.shape[2]
            step = 128 if length <= 512 else 256
            reach = torch.ones(length, length, dtype=torch.bool).tril()
            mixed = torch.cat(
                [
                    mix(q[:, :, at:end], k[:, :, :end], v[:, :, :end], reach[at:end, :end])
                    for at, end in ((i, min(i + step, length)) for i in range(0, length, step))
                ],
                2,
            )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, width] -> [B, T, width], causal from position 0."""
        inner = self.input_layernorm(x)
        q = self.self_attn.queries(inner, rope)
        k, v = self.self_attn.keys_values(inner, rope)
        x = x + self.self_attn.attend(q, k, v)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """The stack below the vocabulary head (`model.*` in a checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def embedding_scale(self) -> float:
        """What multiplies the embedding's rows."""
        return 1.0

    def states(self, tokens: Tensor) -> Iterator[Tensor]:
        """tokens [B, T] -> the residual stream [B, T, D]: as it enters the first layer, then after each layer."""
        config = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = rope_table(positions, config.head_dim, config.rope_theta)
        x = self.embed_tokens(tokens).float()
        yield x
        for layer in self.layers:
            x = layer(x, rope)
            yield x

    def forward(self, tokens: Tensor, taps: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (normed hidden [B, T, D], outputs of the tapped layers [B, T, n*D])."""
        kept: list[Tensor] = []
        for index, state in enumerate(self.states(tokens), -1):
            x = state
            if index in taps:
                kept.append(x)
        return self.norm(x), torch.cat(kept, -1) if kept else x[..., :0]


class Qwen3(nn.Module):
    """Qwen3ForCausalLM with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.reset()

    def reset(self) -> None:
        """Normal(0, 0.02) everywhere, residual outputs scaled down by depth."""
        scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 * (scale if residual else 1.0))

    @property
    def head(self) -> Tensor:
        """The vocabulary head [V, D]: the embedding."""
        return self.model.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden [..., D] -> logits [..., V] (the head is the embedding)."""
        out: Tensor = F.linear(hidden, self.model.embed_tokens.weight)
        return out

    def loss(self, tokens: Tensor, chunk: int = 4096) -> Tensor:
        """Mean next-token cross-entropy (nats) of tokens [B, T+1], in row chunks."""
        hidden, _ = self.model(tokens[:, :-1])
        rows, goals = hidden.flatten(0, 1), tokens[:, 1:].flatten()
        total = rows.new_zeros((), dtype=torch.float32)
        for at in range(0, rows.shape[0], chunk):
            total = total + self.score(rows[at : at + chunk], goals[at : at + chunk])
        mean: Tensor = total / goals.numel()
        return mean

    def score(self, hidden: Tensor, goals: Tensor) -> Tensor:
        """Summed cross-entropy of goals [N] given normed hidden [N, D]."""
        out: Tensor = F.cross_entropy(self.logits(hidden).float(), goals, reduction="sum")
        return out

    def quicken(self) -> None:
        """Compile one layer's code (shared by all layers) and the loss."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.score = torch.compile(self.score, dynamic=False)  # type: ignore[method-assign]
