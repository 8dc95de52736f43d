"""Qwen3 dense decoders (REFERENCE: the Qwen3 technical report's architecture)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.models.decoder import DecoderModel
from engine.models.layers import Geometry, load_layer, read_geometry
from engine.models.loader import Checkpoint
from kernels.decoder_layer import LayerWeights


class Qwen3Model(DecoderModel):
    """Pre-norm layers, all alike, that attend to everything before them."""

    ARCHITECTURES = ("Qwen3ForCausalLM",)

    def read_geometry(self, config: dict[str, Any], directory: Path) -> Geometry:
        return read_geometry(config, directory)

    def load_layers(self, checkpoint: Checkpoint) -> tuple[LayerWeights, ...]:
        g = self.geometry
        return tuple(
            load_layer(checkpoint, f"{self.prefix}layers.{i}", g, self.dtype, self.device) for i in range(g.layers)
        )
