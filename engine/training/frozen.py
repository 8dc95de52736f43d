"""The target during drafter training: frozen, run without gradients, never written."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.training.model import Qwen3, rope_table
from engine.training.trainable import Shared


class Frozen:
    """Runs a target over whole sequences and keeps what drafters ask for.

    Args:
        model: in evaluation mode, without gradients.
        layers: whose outputs `run` keeps; −1 is the embedding's.

    Raises:
        ValueError: a layer that the target does not have.
    """

    def __init__(self, model: Qwen3, layers: tuple[int, ...]) -> None:
        depth = model.config.num_hidden_layers
        for layer in layers:
            if not -1 <= layer < depth:
                raise ValueError(f"feature layer {layer} is not in −1 … {depth - 1}: the target has {depth} layers")
        self.model, self.layers = model, layers
        weight = model.model.embed_tokens.weight.detach()
        self.shared = Shared(model.config, weight, weight)

    def quicken(self) -> None:
        """Compile one layer's code, shared by all layers."""
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (features [B, T, n·D], final normed hidden [B, T, D])."""
        config, decoder = self.model.config, self.model.model
        rope = rope_table(torch.arange(tokens.shape[1], device=tokens.device), config.head_dim, config.rope_theta)
        x = decoder.embed_tokens(tokens)
        kept = {-1: x}
        for index, layer in enumerate(decoder.layers):
            x = layer(x, rope)
            if index in self.layers:
                kept[index] = x
        return torch.cat([kept[layer] for layer in self.layers], -1), decoder.norm(x)
