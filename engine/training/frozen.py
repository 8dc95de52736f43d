"""The target during drafter training: frozen, run without gradients, never written."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.training.gemma3 import Target
from engine.training.trainable import Shared


class Frozen:
    """Runs a target over whole sequences and keeps what drafters ask for.

    Args:
        model: in evaluation mode, without gradients.
        layers: whose outputs `run` keeps; −1 is the embedding's.

    Raises:
        ValueError: a layer that the target does not have.
    """

    def __init__(self, model: Target, layers: tuple[int, ...]) -> None:
        depth = model.config.num_hidden_layers
        for layer in layers:
            if not -1 <= layer < depth:
                raise ValueError(f"feature layer {layer} is not in −1 … {depth - 1}: the target has {depth} layers")
        self.model, self.layers = model, layers
        decoder = model.model
        self.shared = Shared(
            model.config, decoder.embed_tokens.weight.detach(), model.head.detach(), scale=decoder.embedding_scale
        )

    def quicken(self) -> None:
        """Compile one layer's code, shared by all layers."""
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (features [B, T, n·D], final normed hidden [B, T, D])."""
        kept = {}
        for index, state in enumerate(self.model.model.states(tokens), -1):
            x = state
            if index in self.layers:
                kept[index] = x
        return torch.cat([kept[layer] for layer in self.layers], -1), self.model.model.norm(x)


def halve(model: Target) -> None:
    """Keep matrices in bf16 for products that are taken in bf16 anyway: else every product converts them anew."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = weight.data.bfloat16()
