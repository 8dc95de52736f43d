"""The last layers of a target of another family in the form of a drafter's: Qwen3's layer.

A Gemma 3 layer differs in four points, each of which folds into its matrices up to what varies from token to token:

- its norms' weights, 1 + w, go into the columns that read them;
- its norms behind attention and MLP divide by a size that hardly varies (Gemma 3 270M: by 15 to 30 %): its mean over
  the data, and 1 + w, go into the rows that write;
- gelu(x) is close to silu(1.702·x) / 1.702;
- the stream is taken by channel in units of its size (`channels`), so that the embedding of a drafter's slots and what
  layers add to it are of one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.training.channels import inverse, sizes
from engine.training.gemma3 import Gemma3, GemmaLayer
from engine.training.model import DecoderLayer
from engine.training.sources import Stream

_GELU = 1.702  # σ(1.702·x) is the logistic function nearest to the normal distribution's
# A drafter's stream begins with an embedding where the target's came from the layers below. At full size that embedding
# is all that the head sees: the first loss is 21 nats a token; with these, 7 (Gemma 3 270M).
_LOUDER, _FLATTER = 4.0, 0.25


class Beginning(NamedTuple):
    """Where a drafter's weights begin."""

    layers: list[DecoderLayer]
    norm: Tensor  # [D] weights of the norm behind them


@torch.no_grad()
def folded(target: Gemma3, count: int, streams: Sequence[Stream], shares: Sequence[float]) -> Beginning:
    """The target's last `count` layers, in order, in units of the channels' sizes before the last one."""
    decoder, depth = target.model, target.config.num_hidden_layers
    last = [layer for layer in list(decoder.layers)[depth - count :] if isinstance(layer, GemmaLayer)]
    with _written(last) as written:
        found = sizes(target, tuple(range(depth - count - 1, depth)), streams, shares)
    stream = found.features.view(count + 1, -1)
    unit = inverse(stream[count - 1])
    layers = [
        _fold(target, layer, before, unit, *(float(written[norm]) for norm in _closing(layer)))
        for layer, before in zip(last, stream, strict=False)
    ]
    return Beginning(layers, _FLATTER * _columns(decoder.norm.weight, stream[count], unit))


def _closing(layer: GemmaLayer) -> tuple[nn.Module, nn.Module]:
    return layer.post_attention_layernorm, layer.post_feedforward_layernorm


@contextmanager
def _written(layers: Sequence[GemmaLayer]) -> Iterator[dict[nn.Module, Tensor]]:
    """The RMS of what each closing norm is given, while the target runs."""
    found: dict[nn.Module, Tensor] = {}

    def note(norm: nn.Module, given: tuple[Tensor, ...], _: object) -> None:
        found[norm] = given[0].float().square().mean(-1).sqrt()[:, 1:].mean()

    hooks = [norm.register_forward_hook(note) for layer in layers for norm in _closing(layer)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _columns(weight: Tensor, size: Tensor, unit: Tensor) -> Tensor:
    """What an opening norm multiplies a channel with, for a drafter's norm of weight 1 over the stream in units."""
    whole, mine = size.square().mean().sqrt(), (size * unit).square().mean().sqrt()
    return (1.0 + weight.float()) * mine / (unit * whole)


def _fold(
    target: Gemma3, layer: GemmaLayer, before: Tensor, unit: Tensor, attended: float, gated: float
) -> DecoderLayer:
    """One layer.

    Args:
        before: [D] the stream's sizes as they enter the layer.
        unit: [D].
        attended, gated: RMS of what attention and the MLP write, before their closing norms.
    """
    mine, his, inner = DecoderLayer(target.config), layer.self_attn, layer.mlp
    heads, mlp = mine.self_attn, mine.mlp
    reads = _columns(layer.input_layernorm.weight, before, unit)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(heads, name).weight.copy_(getattr(his, name).weight.float() * reads)
    writes = _LOUDER * unit * (1.0 + layer.post_attention_layernorm.weight.float()) / attended
    heads.o_proj.weight.copy_(writes[:, None] * his.o_proj.weight.float())
    heads.q_norm.weight.copy_((1.0 + his.q_norm.weight.float()) * his.scale * his.head_dim**0.5)
    heads.k_norm.weight.copy_(1.0 + his.k_norm.weight.float())
    reads = _columns(layer.pre_feedforward_layernorm.weight, before, unit)
    mlp.gate_proj.weight.copy_(inner.gate_proj.weight.float() * reads * _GELU)
    mlp.up_proj.weight.copy_(inner.up_proj.weight.float() * reads / _GELU)
    writes = _LOUDER * unit * (1.0 + layer.post_feedforward_layernorm.weight.float()) / gated
    mlp.down_proj.weight.copy_(writes[:, None] * inner.down_proj.weight.float())
    return mine
