"""Gemma 3 decoders, text only (REFERENCE: the Gemma 3 technical report; details as transformers' `gemma3_text`).

Beside Qwen3: norms multiply by 1 + w, and what a half of a layer adds to the residual is normed once more; the gate is
GELU by its tanh formula; rows of the embedding come times √hidden; scores are divided by √query_pre_attn_scalar; and
most layers see a sliding window, with a rope of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import LoadError
from engine.models.decoder import DecoderModel
from engine.models.layers import Geometry, load_layer, read_sizes
from engine.models.loader import Checkpoint, setting
from kernels.decoder_layer import LayerWeights
from kernels.rope import rope_table
from kernels.values import GELU_TANH

FULL, SLIDING = "full_attention", "sliding_attention"
# What published files leave out, multimodal ones nearly everything: the values of transformers' Gemma3TextConfig.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_REFUSED = ("attention_bias", "use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of one kind of layer."""

    theta: float
    factor: float = 1.0  # positions are divided by it


@dataclass(frozen=True, slots=True)
class Gemma3Config:
    """What config.json says of a decoder; `geometry` holds the full layers' rope."""

    geometry: Geometry
    kinds: tuple[str, ...]  # each layer's: FULL or SLIDING
    window: int  # positions that a sliding layer sees, its own included
    local_rope: Rope  # of sliding layers
    score_scale: float


def read_gemma3(config: dict[str, Any], directory: Path) -> Gemma3Config:
    """A decoder's sizes from config.json, alone or out of a multimodal one; left-out keys have the family's defaults.

    Raises:
        LoadError: a key is missing, of the wrong type, or asks for something that is not served.
    """
    text, source = config.get("text_config"), directory / "config.json"
    config = {**_DEFAULTS, **(text if isinstance(text, dict) else config)}
    for name in _REFUSED:
        if config.get(name):
            raise LoadError(f"{source}: {name} is not served for Gemma 3")
    if config["hidden_activation"] != "gelu_pytorch_tanh":
        raise LoadError(f"{source}: hidden_activation {config['hidden_activation']!r} is not served for Gemma 3")
    rope = _read_rope(config, FULL, directory)
    geometry = read_sizes(config, directory, rope_theta=rope.theta, rope_factor=rope.factor)
    kinds = _read_kinds(config, geometry.layers, directory)
    window: int = setting(config, "sliding_window", int, directory) if SLIDING in kinds else 1
    if window < 1:
        raise LoadError(f"{source}: sliding_window must be positive, got {window}")
    scale = setting(config, "query_pre_attn_scalar", float, directory) ** -0.5
    return Gemma3Config(geometry, kinds, window, _read_rope(config, SLIDING, directory), scale)


def find_prefix(checkpoint: Checkpoint) -> str:
    """What the decoder's tensor names begin with, alone or in a multimodal checkpoint."""
    prefixes = ("model.", "model.language_model.", "language_model.model.")
    return next((p for p in prefixes if f"{p}embed_tokens.weight" in checkpoint), prefixes[0])


def embedding_scale(hidden_size: int, dtype: torch.dtype) -> float:
    """√hidden, rounded as transformers rounds it: to the dtype of the embedding."""
    return float(torch.tensor(hidden_size**0.5).to(dtype))


class Gemma3Model(DecoderModel):
    """The text decoder, alone or out of a multimodal checkpoint, whose other parts are ignored."""

    ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    IGNORED_BEGINNINGS = tuple(
        f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
    )

    def read_geometry(self, config: dict[str, Any], directory: Path) -> Geometry:
        self.text = read_gemma3(config, directory)
        return self.text.geometry

    def find_prefix(self, checkpoint: Checkpoint) -> str:
        return find_prefix(checkpoint)

    def load_layers(self, checkpoint: Checkpoint) -> tuple[LayerWeights, ...]:
        g, local = self.geometry, self.text.local_rope
        rope = rope_table(self.max_length, g.head_dim, local.theta, self.device, factor=local.factor)
        layers = []
        for index, kind in enumerate(self.text.kinds):
            prefix = f"{self.prefix}layers.{index}"
            where = (checkpoint, prefix, g, self.dtype, self.device)
            common = load_layer(*where, post_norm="pre_feedforward_layernorm", take_gains=self._take_gains)
            added = [f"{prefix}.post_{half}_layernorm.weight" for half in ("attention", "feedforward")]
            after_attention, after_feedforward = (self._take_gains(checkpoint, n, g.hidden_size) for n in added)
            sliding = kind == SLIDING
            layers.append(
                replace(
                    common,
                    post_attention_norm=after_attention,
                    post_feedforward_norm=after_feedforward,
                    activation=GELU_TANH,
                    scale=self.text.score_scale,
                    window=self.text.window if sliding else 0,
                    rope=rope if sliding else None,
                )
            )
        return tuple(layers)

    def load_norm(self, checkpoint: Checkpoint) -> torch.Tensor:
        return self._take_gains(checkpoint, f"{self.prefix}norm.weight", self.geometry.hidden_size)

    def _take_gains(self, checkpoint: Checkpoint, name: str, width: int) -> torch.Tensor:
        """1 + w, added in float32."""
        return (1.0 + checkpoint.take(name, (width,), torch.float32)).to(self.activations).to(self.device)

    @property
    def embedding_scale(self) -> float:
        return embedding_scale(self.geometry.hidden_size, self.dtype)


def _read_kinds(config: dict[str, Any], layers: int, directory: Path) -> tuple[str, ...]:
    """Each layer's kind of attention: `layer_types`, or every `sliding_window_pattern`-th is full."""
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        if not isinstance(pattern, int) or pattern < 1:
            raise LoadError(f"{directory / 'config.json'}: sliding_window_pattern must be positive, got {pattern!r}")
        kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise LoadError(f"{directory / 'config.json'}: layer_types must name {layers} layers, each {FULL} or {SLIDING}")
    return tuple(kinds)


def _read_rope(config: dict[str, Any], kind: str, directory: Path) -> Rope:
    """Angles of one kind of layer, from `rope_parameters` or the older keys (`rope_theta`, `rope_local_base_freq`)."""
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and nested:
        rope = {"rope_theta": 1e6 if kind == FULL else 1e4, **(nested.get(kind) or {})}
    elif kind == FULL:
        rope = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 1e6)}
    else:
        rope = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    method = rope.get("rope_type", rope.get("type", "default"))
    if method not in ("default", "linear"):
        raise LoadError(f"{directory / 'config.json'}: rope type {method!r} is not served, only default and linear")
    theta: float = setting(rope, "rope_theta", float, directory)
    factor: float = setting(rope, "factor", float, directory) if method == "linear" else 1.0
    if theta <= 0 or factor <= 0:
        raise LoadError(
            f"{directory / 'config.json'}: rope_theta and factor must be positive, got {theta} and {factor}"
        )
    return Rope(theta, factor)
