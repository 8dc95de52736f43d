"""What the families' layers have in common, in the target and in its drafters: geometry and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.allocator import zeros_on_demand
from engine.config import PAGE_SIZE
from engine.errors import LoadError
from engine.models.loader import Checkpoint, setting
from kernels.decoder_layer import LayerCache, LayerWeights
from kernels.matmul import pack
from kernels.values import cache_shapes


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a decoder, from config.json."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    rope_factor: float = 1.0  # positions are divided by it

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def read_geometry(config: dict[str, Any], source: Path) -> Geometry:
    """Sizes from a Qwen3 config.json, old (`rope_theta`) or new (`rope_parameters`) spelling.

    Raises:
        LoadError: a key is missing, of the wrong type, or asks for something that is not served.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise LoadError(f"{source / 'config.json'}: rope type {kind!r} is not served, only 'default'")
    if config.get("attention_bias"):
        raise LoadError(f"{source / 'config.json'}: attention_bias is not served for Qwen3")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise LoadError(f"{source / 'config.json'}: sliding window layers are not served for Qwen3")
    if config.get("hidden_act", "silu") != "silu":
        raise LoadError(f"{source / 'config.json'}: hidden_act {config['hidden_act']!r} is not served")
    theta: float = setting({**config, **rope}, "rope_theta", float, source, 10000.0)
    return read_sizes(config, source, rope_theta=theta)


def read_sizes(config: dict[str, Any], source: Path, *, rope_theta: float, rope_factor: float = 1.0) -> Geometry:
    """What every family's config.json says in the same words.

    Raises:
        LoadError: a key is missing or of the wrong type, or sizes do not fit each other.
    """

    def size(name: str, default: int | None = None) -> int:
        value: int = setting(config, name, int, source, default)
        if value < 1:
            raise LoadError(f"{source / 'config.json'}: {name} must be positive, got {value}")
        return value

    heads = size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise LoadError(f"{source / 'config.json'}: num_attention_heads is no multiple of num_key_value_heads")
    hidden = size("hidden_size")
    return Geometry(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", hidden // heads),
        intermediate_size=size("intermediate_size"),
        eps=setting(config, "rms_norm_eps", float, source, 1e-6),
        rope_theta=rope_theta,
        max_positions=size("max_position_embeddings", 32768),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_factor=rope_factor,
    )


def activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What runs between the matrix products of a model whose weights and caches are of `dtype`.

    On CPU bfloat16 is a format of factors: residual, norms, softmax and every sum stay float32.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def take_qkv(
    checkpoint: Checkpoint,
    prefix: str,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    width: int | None = None,
) -> torch.Tensor:
    """The rows of a layer's q, k and v projections, [(heads + 2 kv_heads) · head_dim, width]; width D by default."""
    g, columns = geometry, geometry.hidden_size if width is None else width
    sizes = {"q": g.heads * g.head_dim, "k": g.kv_width, "v": g.kv_width}
    names = {f"{prefix}.self_attn.{part}_proj.weight": rows for part, rows in sizes.items()}
    return torch.cat([checkpoint.take(name, (rows, columns), dtype).to(device) for name, rows in names.items()])


def load_layer(
    checkpoint: Checkpoint,
    prefix: str,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    *,
    input_norm: str = "input_layernorm",
    post_norm: str = "post_attention_layernorm",
    qkv: torch.Tensor | None = None,
    take_gains: Callable[[Checkpoint, str, int], torch.Tensor] | None = None,
) -> LayerWeights:
    """One decoder layer's weights, products that share an input joined and packed.

    Args:
        input_norm: the name of the norm before the attention.
        post_norm: the name of the norm behind it, before the gated block.
        qkv: the joined projections, where they are not simply the checkpoint's.
        take_gains: how a norm's weight is had by its tensor's name and width, where it is not simply the checkpoint's.
    """
    g = geometry
    attention = g.heads * g.head_dim
    gains = activation_dtype(dtype, device)

    def take(name: str, *shape: int) -> torch.Tensor:
        if len(shape) == 1 and take_gains is not None:
            return take_gains(checkpoint, f"{prefix}.{name}.weight", *shape)
        kind = dtype if len(shape) == 2 else gains
        return checkpoint.take(f"{prefix}.{name}.weight", shape, kind).to(device)

    gate_up = torch.cat(
        [
            take("mlp.gate_proj", g.intermediate_size, g.hidden_size),
            take("mlp.up_proj", g.intermediate_size, g.hidden_size),
        ]
    )
    return LayerWeights(
        input_norm=take(input_norm, g.hidden_size),
        qkv=pack(take_qkv(checkpoint, prefix, g, dtype, device) if qkv is None else qkv),
        q_norm=take("self_attn.q_norm", g.head_dim),
        k_norm=take("self_attn.k_norm", g.head_dim),
        o=pack(take("self_attn.o_proj", g.hidden_size, attention)),
        post_norm=take(post_norm, g.hidden_size),
        gate_up=pack(gate_up),
        down=pack(take("mlp.down_proj", g.hidden_size, g.intermediate_size)),
        heads=g.heads,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        eps=g.eps,
    )


def new_cache(geometry: Geometry, pages: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    """An empty paged cache for one layer (kernels.values.LayerCache)."""
    paired = device.type == "cpu" and dtype == torch.bfloat16 and geometry.head_dim % 2 == 0
    k_shape, v_shape = cache_shapes(pages, geometry.kv_heads, geometry.head_dim, paired)
    v = zeros_on_demand(v_shape, dtype, device)
    k = zeros_on_demand(k_shape, dtype, device) if device.type == "cpu" else torch.zeros_like(v).mT
    return LayerCache(k, v)


def page_bytes(geometry: Geometry, layers: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes in the caches of `layers` layers."""
    return 2 * layers * geometry.kv_width * PAGE_SIZE * dtype.itemsize
