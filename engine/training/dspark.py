"""The DSpark drafter for training: backbone, Markov head and confidence head.

Parameter names are those of the public checkpoints. Shapes: B sequences of T positions, A
anchors each, γ slots a block, D width, F features a position, V vocabulary, R Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.training.model import DecoderLayer, ModelConfig, RMSNorm, rope_table


@dataclass(frozen=True)
class DraftConfig:
    """A drafter of a target with sizes `base`."""

    base: ModelConfig = field(default_factory=ModelConfig)
    layers: int = 2
    block_size: int = 7
    target_layer_ids: tuple[int, ...] = (1, 3, 6, 8, 10)
    mask_token_id: int = 3
    markov_rank: int = 128
    num_anchors: int = 64

    def public(self) -> dict[str, Any]:
        """The keys that a DSpark config.json adds to Qwen3's."""
        return {
            "architectures": ["Qwen3DSparkModel"],
            "block_size": self.block_size,
            "target_layer_ids": list(self.target_layer_ids),
            "mask_token_id": self.mask_token_id,
            "markov_rank": self.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "num_anchors": self.num_anchors,
            "num_target_layers": self.base.num_hidden_layers,
        }


class DraftLayer(DecoderLayer):
    """A decoder layer whose queries are block slots and whose keys are features and slots."""

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, mask: Tensor, ropes: tuple[tuple[Tensor, Tensor], ...]
    ) -> Tensor:
        """x [B, A·γ, D], context [B, T, D], mask [B, 1, A·γ, T + A·γ] -> [B, A·γ, D].

        ropes: tables of the slots and of the context. The input norm is for slots only.
        """
        inner = self.input_layernorm(x)
        q = self.self_attn.queries(inner, ropes[0])
        own_k, own_v = self.self_attn.keys_values(inner, ropes[0])
        k, v = self.self_attn.keys_values(context, ropes[1])
        k, v = torch.cat((k, own_k), 2), torch.cat((v, own_v), 2)
        x = x + self.self_attn.attend(q, k, v, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class MarkovHead(nn.Module):
    """Bias W2·W1[previous token] added to a slot's base logits."""

    def __init__(self, vocab: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, vocab, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.normal_(self.markov_w2.weight, std=0.02)


class ConfidenceHead(nn.Module):
    """σ(w·[h; W1[previous token]] + b): the predicted chance that the slot's token is accepted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


def block_mask(anchors: Tensor, length: int, block: int) -> Tensor:
    """Who a slot sees: features before its anchor, and the slots of its own block.

    anchors [B, A] positions -> bool [B, 1, A·γ, T + A·γ].
    """
    count = anchors.shape[1]
    context = torch.arange(length) < anchors[..., None]
    context = context.repeat_interleave(block, 1)
    own = torch.arange(count).repeat_interleave(block)
    same = (own[:, None] == own).expand(len(anchors), -1, -1)
    return torch.cat((context, same), -1)[:, None]


class DSpark(nn.Module):
    """Drafter; embedding and vocabulary head belong to the target and are passed in."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        base = config.base
        self.config = config
        width = base.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, base.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(base) for _ in range(config.layers))
        self.norm = RMSNorm(width, base.rms_norm_eps)
        self.markov_head = MarkovHead(base.vocab_size, config.markov_rank)
        self.confidence_head = ConfidenceHead(width + config.markov_rank)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ("layers." in name or name == "fc.weight"):
                nn.init.normal_(weight, std=0.02)

    def hidden(self, features: Tensor, anchors: Tensor, first: Tensor, table: Tensor) -> Tensor:
        """Normed slot states [B, A, γ, D].

        features [B, T, F·D]; anchors [B, A] positions n; first [B, A] tokens at n; table [V, D].
        """
        config, base = self.config, self.config.base
        block, (rows, count) = config.block_size, anchors.shape
        context = self.hidden_norm(self.fc(features))
        slots = first.new_full((rows, count, block), config.mask_token_id)
        slots[..., 0] = first
        x = nn.functional.embedding(slots.flatten(1), table)
        places = (anchors[..., None] + torch.arange(block)).flatten(1)
        cos, sin = rope_table(places, base.head_dim, base.rope_theta)
        ropes = (
            (cos[:, None], sin[:, None]),
            rope_table(torch.arange(features.shape[1]), base.head_dim, base.rope_theta),
        )
        mask = block_mask(anchors, features.shape[1], block)
        for layer in self.layers:
            x = layer(x, context, mask, ropes)
        out: Tensor = self.norm(x).unflatten(1, (count, block))
        return out

    def heads(self, hidden: Tensor, previous: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [..., D], previous tokens [...] -> draft logits [..., V], confidence logits [...].

        Logits are table·h + W2·W1[previous].
        """
        low = self.markov_head.markov_w1(previous)
        scores = nn.functional.linear(hidden, table) + self.markov_head.markov_w2(low)
        joined = torch.cat((hidden, low.to(hidden.dtype)), -1)
        return scores, self.confidence_head.proj(joined).squeeze(-1)
