"""A decoder layer whose queries are block slots and whose keys are context features and the slots' own block."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.training.model import DecoderLayer

Rope = tuple[Tensor, Tensor]


def block_attention(
    q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], anchors: Tensor, block: int
) -> Tensor:
    """Attention of packed blocks: slots see context before their anchor and all of their own block.

    The block-diagonal part is computed on its diagonal alone, then both share one softmax.

    Args:
        q: [B, H, A·γ, d]; context: K and V [B, G, T, d]; own: K and V of the slots [B, G, A·γ, d].
        anchors: [B, A] positions.

    Returns:
        [B, H, A·γ, d].
    """
    rows, groups, length, size = context[0].shape
    count, share = anchors.shape[1], q.shape[1] // groups
    q = q.reshape(rows, groups, share, count, block, size)
    outer = q.reshape(rows, groups, share * count * block, size)
    inner = q.transpose(2, 3).reshape(rows * groups * count, share * block, size)
    own_k, own_v = (t.reshape(rows * groups * count, block, size) for t in own)
    seen = (outer @ context[0].transpose(-1, -2)).float() * size**-0.5
    seen = seen.view(rows, groups, share, count, block, length)
    reach = torch.arange(length, device=anchors.device) < anchors[..., None]  # [B, A, T]
    seen = seen.masked_fill(~reach[:, None, None, :, None], -1e30)
    mates = (inner @ own_k.transpose(-1, -2)).float() * size**-0.5
    mates = mates.view(rows, groups, count, share, block, block).transpose(2, 3)
    weights = torch.softmax(torch.cat((seen, mates), -1), -1).to(q.dtype)
    far = weights[..., :length].reshape(rows, groups, share * count * block, length) @ context[1]
    near = weights[..., length:].transpose(2, 3).reshape(rows * groups * count, share * block, block) @ own_v
    near = near.view(rows, groups, count, share, block, size).transpose(2, 3)
    mixed = far.view(rows, groups, share, count, block, size) + near
    return mixed.reshape(rows, groups * share, count * block, size)


class BlockLayer(DecoderLayer):
    """Pre-norm attention and MLP over slots; the input norm is for slots only, context comes normed."""

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, anchors: Tensor, block: int, ropes: tuple[Rope, Rope]
    ) -> Tensor:
        """x [B, A·γ, D], context [B, T, D], anchors [B, A] -> [B, A·γ, D].

        ropes: tables of the slots and of the context.
        """
        attention = self.self_attn
        inner = self.input_layernorm(x)
        q = attention.queries(inner, ropes[0])
        own = attention.keys_values(inner, ropes[0])
        mixed = block_attention(q, attention.keys_values(context, ropes[1]), own, anchors, block)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
