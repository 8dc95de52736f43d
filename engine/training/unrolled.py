"""Training of drafters that decode one token after the other (Eagle3, MTP-1): unrolled as they will be served.

A row i reads a state and the token x_{i+1} after it, attends to rows 0 … i and predicts x_{i+2}, see
`engine.drafters.autoregressive`. A block anchored at n unrolls row i = n−1 for γ steps ("training-time test", EAGLE-3):
step k reads what step k−1 left and the token x_{n+k}, at rope position i+k; it attends to the context, rows 0 … i from
the target's features, and to its own steps 1 … k; it is taught with the target's distribution after x_{n+k}. Tokens are
the true ones in every step.

Shapes: B sequences of T positions, A anchors each, γ steps, D width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.training.anchors import Blocks, choose_anchors
from engine.training.channels import fold
from engine.training.draft_vocabulary import DraftVocabulary
from engine.training.export import qwen3_keys, write
from engine.training.gemma3 import Target
from engine.training.labels import Labels
from engine.training.losses import expected_length
from engine.training.model import DecoderLayer, rope_table
from engine.training.sources import Stream
from engine.training.step_loss import StepLoss, StepTerms
from engine.training.streamed import streamed
from engine.training.trainable import Batch, Metrics, Shared, chunks


def unrolled_attention(
    q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor] | None, anchors: Tensor
) -> Tensor:
    """Attention of one step of every block, in one softmax: context rows before the anchor, and the block's own steps.

    Args:
        q: [B, H, A, d]; context: K and V [B, G, T, d].
        own: K and V [B, G, A, k, d] of steps 1 … k; None in step 0, whose own row is one of the context's.
        anchors: [B, A] positions n; context rows 0 … n−1 are seen.

    Returns:
        [B, H, A, d].
    """
    rows, groups, length, size = context[0].shape
    share, count = q.shape[1] // groups, q.shape[2]
    q = q.reshape(rows, groups, share, count, size)
    seen = (q.flatten(2, 3) @ context[0].transpose(-1, -2)).float() * size**-0.5
    seen = seen.view(rows, groups, share, count, length)
    reach = torch.arange(length, device=anchors.device) < anchors[..., None]
    seen = seen.masked_fill(~reach[:, None, None], -1e30)
    if own is not None:
        mates = torch.einsum("bgsad,bgakd->bgsak", q, own[0]).float() * size**-0.5
        seen = torch.cat((seen, mates), -1)
    weights = torch.softmax(seen, -1).to(q.dtype)
    mixed = (weights[..., :length].flatten(2, 3) @ context[1]).view(rows, groups, share, count, size)
    if own is not None:
        mixed = mixed + torch.einsum("bgsak,bgakd->bgsad", weights[..., length:], own[1])
    return mixed.reshape(rows, groups * share, count, size)


class UnrolledDrafter(nn.Module):
    """What Eagle3 and MTP-1 share under training: one layer, unrolled at anchors; embedding and head are the target's.

    Args:
        steps: γ.
        anchors: blocks a sequence of 256 tokens; 0 for every position.
        first_anchor: no anchor before this position.
        chunk: logits held at once, in values.
        draft_ids: the target ids of a reduced draft vocabulary, in draft order.
    """

    feature_layers: tuple[int, ...]

    def __init__(
        self,
        shared: Shared,
        terms: StepTerms,
        *,
        steps: int,
        anchors: int,
        first_anchor: int,
        chunk: int,
        draft_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base, self.terms, self.steps = shared.config, terms, steps
        self.anchors, self.first_anchor, self.chunk = anchors, first_anchor, chunk
        self.vocabulary = DraftVocabulary(shared.config.vocab_size, draft_ids)
        self._loss = StepLoss(terms, self.vocabulary)

    @property
    def layer(self) -> DecoderLayer:
        """The one decoder layer."""
        raise NotImplementedError

    def enter(self, batch: Batch) -> Tensor:
        """The states [B, T, D] from which context rows start."""
        raise NotImplementedError

    def read(self, state: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """From states and the embeddings of the tokens after them, each [..., D]: the layer's residual input [..., D]
        and what its attention reads [..., width]."""
        raise NotImplementedError

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the layer's output [..., D]: the next step's state, and the head's input."""
        raise NotImplementedError

    def begin(self, target: Target, streams: Sequence[Stream], shares: Sequence[float]) -> None:
        """See Trainable.begin."""

    def config(self) -> dict[str, Any]:
        """The keys of config.json that differ from the target's."""
        raise NotImplementedError

    def quicken(self) -> None:
        """Compile the passes over the vocabulary; the layer's rows are too few to pay."""
        self._loss.quicken()

    def reset(self) -> None:
        """Normal(0, 0.02) for every matrix, as the other drafters start."""
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def hidden(self, batch: Batch, blocks: Blocks) -> Tensor:
        """What the head reads in every step, [B, A, γ, D]."""
        base, layer, embed = self.base, self.layer, batch.shared.embed
        attention = layer.self_attn
        places = torch.arange(batch.tokens.shape[1] - 1, device=batch.tokens.device)
        state = self.enter(batch)[:, :-1]  # the last row's following token is unknown
        _, inner = self.read(state, embed(batch.tokens[:, 1:]))
        context = attention.keys_values(inner, rope_table(places, base.head_dim, base.rope_theta))
        rows = (blocks.anchors - 1).clamp_min(0)
        state = state.gather(1, rows[..., None].expand(-1, -1, state.shape[-1]))
        found: list[Tensor] = []
        own: list[tuple[Tensor, Tensor]] = []
        for step in range(self.steps):
            x, inner = self.read(state, embed(blocks.previous[..., step]))
            cos, sin = rope_table(rows + step, base.head_dim, base.rope_theta)
            rope = (cos[:, None], sin[:, None])
            if step:
                own.append(attention.keys_values(inner, rope))
            mates = None
            if own:
                mates = (torch.stack([k for k, _ in own], 3), torch.stack([v for _, v in own], 3))
            mixed = unrolled_attention(attention.queries(inner, rope), context, mates, blocks.anchors)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            state, head_input = self.leave(x + layer.mlp(layer.post_attention_layernorm(x)))
            found.append(head_input)
        return torch.stack(found, 2)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Σ w·ℓ / Σ w over the valid steps of all blocks, w = decay^k; see Trainable.loss and `StepTerms`."""
        length = batch.tokens.shape[1]
        count = max(1, self.anchors * length // 256) if self.anchors else length
        blocks = choose_anchors(batch, count, self.steps, self.first_anchor)
        hidden = self.hidden(batch, blocks)
        decay = self.terms.decay ** torch.arange(self.steps, dtype=torch.float32, device=hidden.device)
        weight = (decay * blocks.valid).flatten()
        share = weight / batch.total(weight.sum()).clamp_min(1e-9)
        goals = blocks.goals.flatten()
        labels = Labels(batch, blocks.rows.flatten(), share > 0, self.vocabulary.on(share.device))

        def score(part: slice, states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self._loss(F.linear(states, labels.head), labels.at(part), goals[part], share[part])

        parts = list(chunks(len(goals), labels.width, self.chunk))
        loss, accept, agree, entropy = streamed(score, parts, [hidden.flatten(0, 2)], [])
        return loss, self._metrics(blocks, accept, agree, entropy)

    def _metrics(self, blocks: Blocks, accept: Tensor, agree: Tensor, entropy: Tensor) -> Metrics:
        valid = blocks.valid.flatten(0, 1)
        accept, agree, entropy = (t.view(-1, self.steps) for t in (accept, agree, entropy))
        whole = valid.all(-1).float()
        slots = valid.float().sum(0)
        return {
            "tau": ((expected_length(accept) * whole).sum(), whole.sum()),
            "tau_greedy": ((expected_length(agree) * whole).sum(), whole.sum()),
            "acceptance": ((accept * valid).sum(0), slots),
            "cross_entropy": ((entropy * valid).sum(), slots.sum()),
        }

    def export(self, folder: Path) -> None:
        """Write the drafter in the public layout, without the target's embedding and head."""
        config = {**qwen3_keys(self.base), "num_hidden_layers": 1, **self.config(), **self.vocabulary.keys()}
        config["num_target_layers"] = self.base.num_hidden_layers
        write(folder, config, {**fold(self.state_dict()), **self.vocabulary.maps()})
