"""DSpark and DFlash under training: backbone, sequential head and confidence head (DSpark paper, section 3).

Parameter names are those of the public checkpoints. Shapes: B sequences of T positions, A anchors each, γ
slots a block, D width, n feature layers, V vocabulary, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.drafters.heads import HEADS
from engine.training.anchors import Blocks, choose_anchors
from engine.training.block_layer import BlockLayer
from engine.training.channels import SCALE, fold, inverse, sample, sizes
from engine.training.draft_vocabulary import DraftVocabulary
from engine.training.export import qwen3_keys, write
from engine.training.frozen import Frozen
from engine.training.gemma3 import Target
from engine.training.labels import Labels
from engine.training.losses import Terms, confidence_loss, expected_length, slot_weights
from engine.training.model import RMSNorm, rope_table
from engine.training.nearest import read_nearest
from engine.training.settings import SettingsError, knob
from engine.training.sources import Stream
from engine.training.starting import bigram_factors, last_layers
from engine.training.step_loss import StepLoss
from engine.training.streamed import streamed
from engine.training.trainable import Batch, Metrics, Shared, chunks, register


@dataclass(frozen=True)
class DSparkOptions:
    """The [model] table of `--drafter dspark`."""

    layers: int = knob(2, "decoder layers of the backbone")
    block_size: int = knob(7, "γ, tokens drafted a round")
    feature_layers: tuple[int, ...] = knob((), "target layers to read, increasing; empty: five spread over the depth")
    mask_token_id: int = knob(3, "the token that stands in the slots after the anchor")
    head: str = knob("vanilla", f"sequential head: none or a registered one ({', '.join(HEADS)})")
    markov_rank: int = knob(128, "r, the head's rank")
    confidence: bool = knob(True, "whether to train a confidence head")
    confidence_with_markov: bool = knob(True, "whether confidence sees W1 of the token before the slot")
    draft_vocab: int = knob(0, "tokens that may be drafted, the most frequent ones of the data; 0: all")
    anchors: int = knob(24, "blocks a sequence of 256 tokens")
    first_anchor: int = knob(8, "no anchor before this position")
    init: Literal["noise", "bigrams", "target"] = knob(
        "noise", "where weights begin; bigrams: the data's, in the head; target: those, and its last layers"
    )
    nearest: bool = knob(False, "first-layer heads begin by reading the state before the anchor (`nearest`)")
    channel_scale: bool = knob(False, "begin with the target's channels at their sizes over the data (`channels`)")
    chunk: int = knob(2**24, "logits held at once, in values (rows times vocabulary)")
    loss: Terms = field(default_factory=Terms, metadata={"help": "mixing weights"})

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.layers < 1 or self.anchors < 1:
            raise SettingsError("block_size, layers and anchors must be at least 1")
        if self.head != "none" and self.head not in HEADS:
            raise SettingsError(f"head {self.head!r} is not one of none, {', '.join(HEADS)}")
        if list(self.feature_layers) != sorted(set(self.feature_layers)):
            raise SettingsError(f"feature_layers {list(self.feature_layers)} must increase")
        if self.confidence and self.confidence_with_markov and self.head == "none":
            raise SettingsError("confidence_with_markov needs a head; set it to false, or head to one")


def spread(depth: int, count: int = 5) -> tuple[int, ...]:
    """`count` layers from 1 to depth − 2, evenly spaced: the published choice for 36 layers is 1, 9, 17, 25, 33."""
    last = max(1, depth - 3 if depth > 12 else depth - 2)
    return tuple(sorted({round(1 + i * (last - 1) / max(1, count - 1)) for i in range(count)}))


class ConfidenceHead(nn.Module):
    """σ(w·[h; W1[previous token]] + b): the predicted chance that the slot's token is accepted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


@register("dspark")
class DSpark(nn.Module):
    """The drafter; embedding and vocabulary head belong to the target."""

    Options: ClassVar[type] = DSparkOptions
    feature_scale: Tensor | None

    def __init__(self, options: DSparkOptions, shared: Shared) -> None:
        super().__init__()
        base = shared.config
        if not 0 <= options.mask_token_id < base.vocab_size:
            raise SettingsError(f"mask_token_id {options.mask_token_id} is outside the vocabulary of {base.vocab_size}")
        self.options, self.base = options, base
        self.feature_layers = options.feature_layers or spread(base.num_hidden_layers)
        if self.feature_layers[-1] > base.num_hidden_layers - 2:
            raise SettingsError(
                f"feature_layers must stay below the last of {base.num_hidden_layers} layers: it is normed"
            )
        width = base.hidden_size
        self.vocabulary = DraftVocabulary(base.vocab_size, shared.draft_ids)
        self.fc = nn.Linear(len(self.feature_layers) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, base.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(base) for _ in range(options.layers))
        self.norm = RMSNorm(width, base.rms_norm_eps)
        self.markov_head = None
        if options.head != "none":
            self.markov_head = HEADS[options.head](base.vocab_size, options.markov_rank, width, self.vocabulary.size)
        self.confidence_head = None
        if options.confidence:
            extra = options.markov_rank if options.confidence_with_markov else 0
            self.confidence_head = ConfidenceHead(width + extra)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ("layers." in name or name == "fc.weight"):
                nn.init.normal_(weight, std=0.02)
        self.register_buffer(SCALE, torch.ones(self.fc.in_features) if options.channel_scale else None)
        self._token_loss = StepLoss(options.loss, self.vocabulary)

    @torch.no_grad()
    def begin(self, target: Target, streams: Sequence[Stream], shares: Sequence[float]) -> None:
        """Starting weights, as `options.init` says. The layers read the deepest feature layer, as the target's did."""
        if self.feature_scale is not None:
            self.feature_scale.copy_(inverse(sizes(target, self.feature_layers, streams, shares).features))
        if self.options.init == "target":
            theirs, norm = last_layers(target, len(self.layers), streams, shares, self.options.channel_scale)
            for mine, his in zip(self.layers, theirs, strict=True):
                mine.load_state_dict(his.state_dict())
            width = self.base.hidden_size
            self.fc.weight[:, -width:] += torch.eye(width, device=self.fc.weight.device)
            self.hidden_norm.weight.copy_(theirs[0].input_layernorm.weight)
            self.norm.weight.copy_(norm)
        if self.options.nearest:
            self._read_nearest(target, streams, shares)
        if self.options.init != "noise" and self.markov_head is not None:
            rank = self.options.markov_rank
            w1, w2 = bigram_factors(streams, shares, self.base.vocab_size, rank, self.vocabulary.ids)
            self.markov_head.begin(w1, w2)

    def _read_nearest(self, target: Target, streams: Sequence[Stream], shares: Sequence[float]) -> None:
        features, _, tokens = sample(target, self.feature_layers, streams, shares)
        first, shared = self.layers[0], Frozen(target, ()).shared
        assert isinstance(first, BlockLayer)
        masks = torch.full_like(tokens.flatten(), self.options.mask_token_id)
        slots = first.input_layernorm(shared.embed(torch.cat((tokens.flatten(), masks))))
        context = self._context(features).flatten(0, 1)
        read_nearest(first.self_attn, context, slots, self.base.rope_theta)

    def _context(self, features: Tensor) -> Tensor:
        """What keys and values of the context are made of, [B, T, D] from features [B, T, n·D]."""
        seen = features if self.feature_scale is None else features * self.feature_scale
        out: Tensor = self.hidden_norm(self.fc(seen))
        return out

    def quicken(self) -> None:
        """Compile a layer's code, shared by all layers, and the passes over the vocabulary."""
        for layer in self.layers:
            layer.compile(dynamic=False)
        self._token_loss.quicken()

    def hidden(self, features: Tensor, blocks: Blocks, shared: Shared) -> Tensor:
        """Normed slot states [B, A, γ, D] from features [B, T, n·D]."""
        base, size = self.base, self.options.block_size
        context = self._context(features)
        slots = torch.full_like(blocks.previous, self.options.mask_token_id)
        slots[..., 0] = blocks.previous[..., 0]
        x = shared.embed(slots.flatten(1))
        cos, sin = rope_table(blocks.positions.flatten(1), base.head_dim, base.rope_theta)
        places = torch.arange(features.shape[1], device=features.device)
        ropes = ((cos[:, None], sin[:, None]), rope_table(places, base.head_dim, base.rope_theta))
        for layer in self.layers:
            x = layer(x, context, blocks.anchors, size, ropes)
        out: Tensor = self.norm(x).unflatten(1, (-1, size))
        return out

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Equations 8 to 12 at anchors sampled from the batch; see Trainable.loss."""
        options, terms = self.options, self.options.loss
        count = max(1, options.anchors * batch.tokens.shape[1] // 256)
        blocks = choose_anchors(batch, count, options.block_size, options.first_anchor)
        hidden = self.hidden(batch.features, blocks, batch.shared)
        weight = slot_weights(blocks.valid, terms.decay).flatten()
        share = weight / batch.total(weight.sum()).clamp_min(1e-9)
        low = latent = None
        if self.markov_head is not None:
            low = self.markov_head.markov_w1(blocks.previous)
            latent = self.markov_head.latents(low, hidden)
        loss, accept, agree, entropy = self._streamed(batch, blocks, hidden, latent, share)
        if self.confidence_head is not None:
            seen = [hidden]
            if options.confidence_with_markov and low is not None:
                seen.append(low.to(hidden.dtype))
            guess = self.confidence_head.proj(torch.cat(seen, -1)).flatten()
            loss = loss + terms.confidence * confidence_loss(guess, accept, share)
        return loss, self._metrics(blocks, accept, agree, entropy)

    def _streamed(
        self, batch: Batch, blocks: Blocks, hidden: Tensor, latent: Tensor | None, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cross-entropy and distance terms, acceptance, agreement, cross-entropy by row), chunk by chunk."""
        goals, ids = blocks.goals.flatten(), self.vocabulary.on(share.device)
        labels = Labels(batch, blocks.rows.flatten(), share > 0, ids)
        markov = self.markov_head
        rows, whole = [hidden.flatten(0, 2)], []
        if markov is not None and latent is not None:
            rows.append(latent.flatten(0, 2))
            whole.append(markov.markov_w2.weight)

        def score(part: slice, states: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            draft = F.linear(states, labels.head)
            if more:
                draft = draft + F.linear(more[0], more[1])
            return self._token_loss(draft, labels.at(part), goals[part], share[part])

        parts = list(chunks(len(goals), labels.width, self.options.chunk))
        found: tuple[Tensor, Tensor, Tensor, Tensor] = streamed(score, parts, rows, whole)
        return found

    def _metrics(self, blocks: Blocks, accept: Tensor, agree: Tensor, entropy: Tensor) -> Metrics:
        size = self.options.block_size
        valid, accept, agree = blocks.valid.flatten(0, 1), accept.view(-1, size), agree.view(-1, size)
        whole = valid.all(-1).float()
        count, slots = whole.sum(), valid.float().sum(0)
        return {
            "tau": ((expected_length(accept) * whole).sum(), count),
            "tau_greedy": ((expected_length(agree) * whole).sum(), count),
            "acceptance": ((accept * valid).sum(0), slots),
            "cross_entropy": ((entropy.view(-1, size) * valid).sum(), slots.sum()),
        }

    def config(self) -> dict[str, Any]:
        """config.json: Qwen3's keys and the public ones of DSpark."""
        options = self.options
        return {
            **qwen3_keys(self.base),
            "num_hidden_layers": options.layers,
            "architectures": ["Qwen3DSparkModel"],
            "block_size": options.block_size,
            "target_layer_ids": list(self.feature_layers),
            "mask_token_id": options.mask_token_id,
            "markov_rank": 0 if options.head == "none" else options.markov_rank,
            "markov_head_type": "vanilla" if options.head == "none" else options.head,
            "enable_confidence_head": options.confidence,
            "confidence_head_with_markov": options.confidence and options.confidence_with_markov,
            "num_anchors": options.anchors,
            "num_target_layers": self.base.num_hidden_layers,
            **self.vocabulary.keys(),
        }

    def export(self, folder: Path) -> None:
        """Write the drafter in the public layout, without the target's embedding and head."""
        write(folder, self.config(), {**fold(self.state_dict()), **self.vocabulary.maps()})


@dataclass(frozen=True)
class DFlashOptions(DSparkOptions):
    """The [model] table of `--drafter dflash`: DSpark without heads, by its published recipe.

    `--set model.loss.cross_entropy=0.1 --set model.loss.distance=0.9` trains it with DSpark's loss instead.
    """

    head: str = knob("none", "none: DFlash has no sequential head")
    confidence: bool = knob(False, "DFlash has no confidence head")
    confidence_with_markov: bool = knob(False, "no head, no Markov features")
    loss: Terms = field(default_factory=lambda: Terms(1.0, 0.0, 0.0), metadata={"help": "cross-entropy alone"})


@register("dflash")
class DFlash(DSpark):
    """The backbone alone."""

    Options: ClassVar[type] = DFlashOptions
