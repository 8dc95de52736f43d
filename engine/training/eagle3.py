"""Eagle3 under training: one layer over [embedding; state], unrolled on its own output (EAGLE-3, as in DeepSpec).

Parameter names are those of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from engine.training.channels import SCALE, inverse, sizes
from engine.training.draft_vocabulary import read_ids
from engine.training.dspark import spread
from engine.training.gemma3 import Target
from engine.training.model import DecoderLayer, ModelConfig, RMSNorm
from engine.training.settings import SettingsError, knob
from engine.training.sources import Stream
from engine.training.starting import last_layers
from engine.training.step_loss import StepTerms
from engine.training.trainable import Batch, Shared, register
from engine.training.unrolled import UnrolledDrafter


@dataclass(frozen=True)
class Eagle3Options:
    """The [model] table of `--drafter eagle3`."""

    steps: int = knob(7, "γ, steps unrolled in training and tokens drafted a round")
    feature_layers: tuple[int, ...] = knob((), "target layers to read, increasing; empty: five spread over the depth")
    draft_vocab: int = knob(0, "tokens that may be drafted, the most frequent ones of the data; 0: all")
    draft_ids: str = knob("", ".npy file with the target ids that may be drafted, instead of counting; empty: none")
    anchors: int = knob(24, "blocks a sequence of 256 tokens; 0: every position, as published: 5 times the work")
    first_anchor: int = knob(8, "no anchor before this position")
    init: Literal["noise", "target"] = knob("noise", "where weights begin; target: its last layer, reading the state")
    channel_scale: bool = knob(False, "begin with the target's channels at their sizes over the data (`channels`)")
    chunk: int = knob(2**24, "logits held at once, in values (rows times vocabulary)")
    loss: StepTerms = field(default_factory=StepTerms, metadata={"help": "mixing weights"})

    def __post_init__(self) -> None:
        if self.steps < 1 or self.anchors < 0 or self.first_anchor < 1:
            raise SettingsError("steps and first_anchor must be at least 1, anchors at least 0")
        if list(self.feature_layers) != sorted(set(self.feature_layers)):
            raise SettingsError(f"feature_layers {list(self.feature_layers)} must increase")
        if self.draft_vocab and self.draft_ids:
            raise SettingsError("give draft_vocab or draft_ids, not both")


class Eagle3Layer(DecoderLayer):
    """A decoder layer whose attention reads the normed embedding and the normed state side by side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention, width = self.self_attn, 2 * config.hidden_size
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(width, getattr(attention, name).out_features, bias=False))


@register("eagle3")
class Eagle3(UnrolledDrafter):
    """The drafter; embedding and vocabulary head belong to the target."""

    Options: ClassVar[type] = Eagle3Options
    feature_scale: Tensor | None

    def __init__(self, options: Eagle3Options, shared: Shared) -> None:
        base = shared.config
        super().__init__(
            shared,
            options.loss,
            steps=options.steps,
            anchors=options.anchors,
            first_anchor=options.first_anchor,
            chunk=options.chunk,
            draft_ids=read_ids(Path(options.draft_ids), base.vocab_size) if options.draft_ids else shared.draft_ids,
        )
        self.options = options
        self.feature_layers = options.feature_layers or spread(base.num_hidden_layers)
        if self.feature_layers[-1] > base.num_hidden_layers - 2:
            raise SettingsError(
                f"feature_layers must stay below the last of {base.num_hidden_layers} layers: it is normed"
            )
        width = base.hidden_size
        self.fc = nn.Linear(len(self.feature_layers) * width, width, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(base)])
        self.norm = RMSNorm(width, base.rms_norm_eps)
        self.register_buffer(SCALE, torch.ones(self.fc.in_features) if options.channel_scale else None)
        self.reset()

    @property
    def layer(self) -> Eagle3Layer:
        found = self.layers[0]
        assert isinstance(found, Eagle3Layer)
        return found

    @torch.no_grad()
    def begin(self, target: Target, streams: Sequence[Stream], shares: Sequence[float]) -> None:
        """The last layer's attention reads the normed state as it did in the target; the embedding's half is noise."""
        if self.feature_scale is not None:
            self.feature_scale.copy_(inverse(sizes(target, self.feature_layers, streams, shares).features))
        if self.options.init == "noise":
            return
        width, mine = self.base.hidden_size, self.layer
        (last,), norm = last_layers(target, 1, streams, shares, self.options.channel_scale)
        weights = mine.state_dict()
        for name, his in last.state_dict().items():
            weights[name][..., -his.shape[-1] :].copy_(his)
        mine.hidden_norm.weight.copy_(weights["input_layernorm.weight"])
        mine.input_layernorm.weight.fill_(1.0)
        self.fc.weight[:, -width:] += torch.eye(width, device=self.fc.weight.device)
        self.norm.weight.copy_(norm)

    def enter(self, batch: Batch) -> Tensor:
        """fc of the target's features."""
        features = batch.features
        out: Tensor = self.fc(features if self.feature_scale is None else features * self.feature_scale)
        return out

    def read(self, state: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The residual is the un-normed state."""
        layer = self.layer
        inner = torch.cat((layer.input_layernorm(embedded).to(state.dtype), layer.hidden_norm(state)), -1)
        return state, inner

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next state is the un-normed output."""
        return x, self.norm(x)

    def config(self) -> dict[str, Any]:
        """The public keys of Eagle3; see `engine.drafters.eagle3`."""
        return {
            "architectures": ["Qwen3Eagle3Model"],
            "draft_num_hidden_layers": 1,
            "target_layer_ids": list(self.feature_layers),
            "ttt_length": self.steps,
            "step_loss_decay": self.terms.decay,
            "block_size": self.steps,
        }
