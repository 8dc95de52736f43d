"""MTP-1 under training: a whole Qwen3 layer behind the target's last (DeepSeek-V3 technical report, section 2.2).

Parameter names are those of `engine.drafters.mtp`, which describes the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from engine.training.channels import inverse, sizes
from engine.training.gemma3 import Target
from engine.training.model import DecoderLayer, ModelConfig, RMSNorm
from engine.training.settings import SettingsError, knob
from engine.training.sources import Stream
from engine.training.starting import last_layers
from engine.training.step_loss import StepTerms
from engine.training.trainable import Batch, Shared, register
from engine.training.unrolled import UnrolledDrafter


@dataclass(frozen=True)
class MTPOptions:
    """The [model] table of `--drafter mtp`.

    `--set model.loss.soft=0 --set model.loss.cross_entropy=1` trains it on the true tokens, as in pretraining.
    """

    steps: int = knob(1, "tokens drafted a round; above 1 the module is re-fed, and unrolled in training")
    draft_vocab: int = knob(0, "tokens that may be drafted, the most frequent ones of the data; 0: all")
    anchors: int = knob(0, "blocks a sequence of 256 tokens; 0: every position")
    first_anchor: int = knob(8, "no anchor before this position")
    init: Literal["noise", "target"] = knob("noise", "where weights begin; target: its last layer, reading the state")
    channel_scale: bool = knob(False, "begin with the target's channels at their sizes over the data (`channels`)")
    feature_layers: tuple[int, ...] = knob((), "unread; those of another drafter, to share its data.cache with it")
    chunk: int = knob(2**24, "logits held at once, in values (rows times vocabulary)")
    loss: StepTerms = field(default_factory=StepTerms, metadata={"help": "mixing weights"})

    def __post_init__(self) -> None:
        if self.steps < 1 or self.anchors < 0 or self.first_anchor < 1:
            raise SettingsError("steps and first_anchor must be at least 1, anchors at least 0")


class MTPModule(nn.Module):
    """The tensors below `mtp.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(width, eps)
        self.pre_fc_norm_hidden = RMSNorm(width, eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config)])
        self.norm = RMSNorm(width, eps)


@register("mtp")
class MTP(UnrolledDrafter):
    """The drafter; embedding, final norm and vocabulary head belong to the target."""

    Options: ClassVar[type] = MTPOptions

    def __init__(self, options: MTPOptions, shared: Shared) -> None:
        super().__init__(
            shared,
            options.loss,
            steps=options.steps,
            anchors=options.anchors,
            first_anchor=options.first_anchor,
            chunk=options.chunk,
            draft_ids=shared.draft_ids,
        )
        self.options = options
        # It reads the final hidden states alone; the embedding costs nothing.
        self.feature_layers = options.feature_layers or (-1,)
        self.mtp = MTPModule(shared.config)
        self.reset()

    @property
    def layer(self) -> DecoderLayer:
        found = self.mtp.layers[0]
        assert isinstance(found, DecoderLayer)
        return found

    @torch.no_grad()
    def begin(self, target: Target, streams: Sequence[Stream], shares: Sequence[float]) -> None:
        """The target's last layer once more, on the state alone but for fc's noise."""
        if self.options.channel_scale:
            hidden = sizes(target, (-1,), streams, shares).hidden
            # Its input is normed by its RMS over channels first.
            self.mtp.pre_fc_norm_hidden.weight.copy_(hidden.square().mean().sqrt() * inverse(hidden))
        if self.options.init == "noise":
            return
        width = self.base.hidden_size
        (last,), norm = last_layers(target, 1, streams, shares, self.options.channel_scale)
        self.layer.load_state_dict(last.state_dict())
        self.mtp.fc.weight[:, -width:] += torch.eye(width, device=self.mtp.fc.weight.device)
        self.mtp.norm.weight.copy_(norm)

    def enter(self, batch: Batch) -> Tensor:
        """The target's final normed states."""
        return batch.hidden

    def read(self, state: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """fc of both, normed; the layer is an ordinary one from there on."""
        mtp = self.mtp
        both = torch.cat((mtp.pre_fc_norm_embedding(embedded).to(state.dtype), mtp.pre_fc_norm_hidden(state)), -1)
        x = mtp.fc(both)
        return x, self.layer.input_layernorm(x)

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed output is the next state and the head's input alike."""
        out = self.mtp.norm(x)
        return out, out

    def config(self) -> dict[str, Any]:
        """The keys of the format; see `engine.drafters.mtp`."""
        return {"architectures": ["Qwen3MTPModel"], "block_size": self.steps}
