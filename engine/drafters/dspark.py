"""DSpark: a parallel backbone, a light sequential head, a confidence head (DSpark paper, section 3).

Slot i of a block (0-based) sits at position n+i, holds h_{i+1} and predicts x_{i+1} at position n+i+1; the
anchor x_0, the last committed token, sits at n. DFlash is the same backbone without heads.
"""

from __future__ import annotations

from collections.abc import Sequence as Places
from pathlib import Path
from typing import Any, Literal, cast

import torch

from engine.batch import build_draft_rows, draft_numbers, front_indices, part_of
from engine.drafters.attachment import check_sizes, read_block_size, read_feature_layers, read_head
from engine.drafters.heads import HEADS
from engine.errors import LoadError
from engine.models.decoder import DecoderModel
from engine.models.layers import load_layer, new_cache, page_bytes, read_geometry
from engine.models.loader import Checkpoint, read_json, setting
from engine.sampling import sampling_rows
from engine.types import DraftBlock, LaidOut, Sequence, StepPlan, Verdict
from kernels.context import ContextWeights, store_context
from kernels.context_pass import ContextPass
from kernels.draft_pass import DraftPass
from kernels.filters import SamplingRows
from kernels.forward import BlockRows, Ends, LayerStack, forward
from kernels.markov_sample import DraftSample, HeadWeights, markov_sample
from kernels.matmul import pack
from kernels.rope import rope_table

KERNELS = ("vanilla", "gated", "rnn")  # heads that a kernel runs; others run as the module they are
HeadKind = Literal["none", "vanilla", "gated", "rnn", "custom"]


class DSparkDrafter:
    """A drafter in the public checkpoint format, attached to a target whose embedding and lm_head it shares.

    Raises:
        LoadError: a key or tensor is missing, of the wrong shape, or belongs to another target.
    """

    ARCHITECTURE = "Qwen3DSparkModel"
    lookahead = 0
    feature_layers: tuple[int, ...]
    kind: str
    head: str

    def __init__(self, directory: Path, target: DecoderModel) -> None:
        config = read_json(directory / "config.json")
        self.geometry = g = read_geometry(config, directory)
        self.target = target
        check_sizes(g, target, directory)
        self.feature_layers = read_feature_layers(config, target, directory)
        self.mask_token_id: int = setting(config, "mask_token_id", int, directory)
        if not 0 <= self.mask_token_id < g.vocab_size:
            raise LoadError(
                f"{directory / 'config.json'}: mask_token_id {self.mask_token_id} is outside the vocabulary"
            )
        self.block_size = read_block_size(config, directory)
        # Most checkpoints let the anchor's slot predict; some DFlash ones spend it and predict from masks alone.
        self.sample_from_anchor: bool = setting(config, "sample_from_anchor", bool, directory, True)
        dtype, device = target.dtype, target.device
        checkpoint = Checkpoint(directory)
        head, ids = read_head(checkpoint, config, target)
        width = len(self.feature_layers) * g.hidden_size
        self.fc = pack(checkpoint.take("fc.weight", (g.hidden_size, width), dtype).to(device))
        gains = target.activations
        self.hidden_norm = checkpoint.take("hidden_norm.weight", (g.hidden_size,), gains).to(device)
        self.norm = checkpoint.take("norm.weight", (g.hidden_size,), gains).to(device)
        self.layers = tuple(load_layer(checkpoint, f"layers.{i}", g, dtype, device) for i in range(g.layers))
        # One product gives every layer's context K and V: the context is a function of the feature alone.
        names = [f"layers.{i}.self_attn.{p}_proj.weight" for i in range(g.layers) for p in ("k", "v")]
        shape = (g.kv_width, g.hidden_size)
        self.context_kv = pack(torch.cat([checkpoint.take(name, shape, dtype) for name in names]).to(device))
        self.k_norms = torch.stack([layer.k_norm for layer in self.layers])
        self.ends = Ends(target.embedding, self.norm, g.eps, head, target.embedding_scale)
        self.heads = _load_heads(checkpoint, config, directory, g.hidden_size, target, ids)
        checkpoint.refuse_leftovers(ignore=("rotary_emb.inv_freq",))
        self.kind = "dflash" if self.heads.kind == "none" and self.heads.confidence_weight is None else "dspark"
        self.head = str(config["markov_head_type"]).lower() if self.heads.kind == "custom" else self.heads.kind
        self.has_confidence = self.heads.confidence_weight is not None
        slots = self.block_size + (0 if self.sample_from_anchor else 1)
        self.slots = slots
        self.first = slots - self.block_size  # the slot that predicts the first token
        self.rope = rope_table(target.max_length + slots, g.head_dim, g.rope_theta, device)
        self.allocate(1)

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.geometry, self.geometry.layers, self.target.dtype)

    def allocate(self, pages: int) -> None:
        g, target = self.geometry, self.target
        self.caches = tuple(new_cache(g, pages, target.dtype, target.device) for _ in self.layers)
        self.stack = LayerStack(self.layers, self.caches)
        parts = (self.ends, self.stack, self.rope, self.heads)
        self.whole = (
            DraftPass(*parts, self.slots, self.mask_token_id, self.first) if DraftPass.applies(*parts) else None
        )
        self.context = ContextWeights(self.fc, self.hidden_norm, self.context_kv, self.k_norms, g.eps, self.caches)
        applies = ContextPass.applies(self.context, self.rope)
        self.absorbs = ContextPass(self.context, self.rope) if applies else None

    def propose(self, sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        """Draft `length` tokens, by default γ, for each sequence; tokens, logits and confidences are [R, length, …].

        The backbone always runs on the whole block: its slots see each other both ways, so that fewer would be
        another drafter. The heads go from left to right, and only as far as they must. On a CPU the block stands until
        the next is drafted.
        """
        length = self.block_size if length is None else length
        for sequence in sequences:
            assert sequence.absorbed == sequence.kv_length, "the drafter's context has holes"
        device, slots = self.target.device, self.slots
        sampling = sampling_rows(sequences, device)
        host = None
        if self.whole is not None:
            given, width = draft_numbers(sequences)
            sample, host = self.whole(given, len(sequences), width, length, sampling)
        else:
            rows = build_draft_rows(sequences, slots, self.mask_token_id, self.first, length, device)
            block = BlockRows(rows.positions, rows.page_table, slots)
            predicting = rows.predicting if length < slots else None
            sample = self._sample(rows.tokens, rows.anchors, block, rows.proposals, sampling, length, predicting)
        drafted = DraftBlock(sequences, sample.tokens, sample.confidence, sample.logits, sample.log_z)
        return drafted if host is None else drafted.drawn_at(host)

    def draft(
        self,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        proposals: torch.Tensor,
        table: torch.Tensor,
        sampling: SamplingRows,
    ) -> DraftSample:
        """Whole blocks of γ tokens from tensors alone: nothing is read by the host, shapes follow from R.

        Args:
            anchors, positions, proposals: [R] int64; the anchors' positions and the requests' proposal counters.
            table: page table [R, P]; every position before an anchor lies in its pages, absorbed.
        """
        count, slots, length = len(anchors), self.slots, self.block_size
        tokens = anchors.new_full((count, slots), self.mask_token_id)
        tokens[:, 0] = anchors
        predicting = None
        if length < slots:
            predicting = torch.arange(count * slots, device=anchors.device).view(count, slots)[:, -length:].flatten()
        block = BlockRows(positions, table, slots)
        return self._sample(tokens.flatten(), anchors, block, proposals, sampling, length, predicting)

    def _sample(
        self,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        block: BlockRows,
        proposals: torch.Tensor,
        sampling: SamplingRows,
        length: int,
        predicting: torch.Tensor | None,
    ) -> DraftSample:
        """Backbone over all slots, heads over the `length` of each block whose rows `predicting` names; None: all."""
        count, positions = len(anchors), block.anchor_positions
        base, hidden, _ = forward(tokens, self.ends, self.stack, self.rope, block, logit_rows=predicting)
        return markov_sample(
            base.view(count, length, -1),
            hidden.float().view(count, length, -1),
            anchors,
            self.heads,
            sampling,
            positions,
            proposals,
        )

    def store(self, features: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the context K and V of rows [T]: one product for all draft layers."""
        store_context(features, self.context, self.rope, positions, slots)

    def absorb(self, plan: StepPlan, verdict: Verdict, chosen: Places[int] | None = None) -> None:
        """Write the context K and V of every kept row: one product for all draft layers."""
        native = self.absorbs is not None and isinstance(verdict.rows, LaidOut)
        if chosen is not None and not native:
            plan, verdict = part_of(plan, verdict, chosen)
            chosen = None
        assert verdict.features is not None
        counts = [0] * len(plan.rows)
        for index in range(len(plan.rows)) if chosen is None else chosen:
            row = plan.rows[index]
            sequence, count = row.sequence, row.count - row.draft_length + verdict.accepted[index]
            assert sequence.absorbed == row.start, "the drafter's context has holes"
            sequence.absorbed = row.start + count
            counts[index] = count
        kept = sum(counts)
        if not kept:  # a round in which nothing ran
            return
        if self.absorbs is not None and isinstance(verdict.rows, LaidOut):
            self.absorbs(verdict.features, verdict.rows.flat, verdict.rows.total, counts)
            return
        features, positions, slots = verdict.features, verdict.batch.positions, verdict.batch.slots
        if kept == len(positions) or (len(counts) == 1):  # all that is kept stands in front
            features, positions, slots = features[:kept], positions[:kept], slots[:kept]
        else:
            front = front_indices(verdict.batch.query_offsets, counts)
            features, positions, slots = (t.index_select(0, front) for t in (features, positions, slots))
        self.store(features, positions, slots)


def _load_heads(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    directory: Path,
    hidden: int,
    target: DecoderModel,
    ids: torch.Tensor | None,
) -> HeadWeights:
    """The sequential head and the confidence head that config.json announces; W1 is indexed by target ids, W2 by
    draft ids."""
    source, vocab = directory / "config.json", target.geometry.vocab_size
    outputs = vocab if ids is None else len(ids)
    rank: int = setting(config, "markov_rank", int, directory, 0)
    kind: str = setting(config, "markov_head_type", str, directory, "vanilla").lower() if rank else "none"
    if rank < 0:
        raise LoadError(f"{source}: markov_rank must not be negative, got {rank}")
    if kind != "none" and kind not in HEADS:
        raise LoadError(f"{source}: markov_head_type {kind!r} is not one of {', '.join(HEADS)}")

    def take(name: str, *shape: int, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        return checkpoint.take(name, shape, dtype).to(target.device)

    parts: dict[str, Any] = {"ids": ids, "vocabulary": vocab}
    if rank:
        parts["w1"] = take("markov_head.markov_w1.weight", vocab, rank)
        # Read γ times a round, the head's whole cost: stays in the checkpoint's own dtype.
        parts["w2"] = take("markov_head.markov_w2.weight", outputs, rank, dtype=None)
    if kind == "gated":
        parts["gate_weight"] = take("markov_head.gate_proj.weight", rank, hidden + rank)
        parts["gate_bias"] = take("markov_head.gate_proj.bias", rank)
    if kind == "rnn":
        parts["joint_weight"] = take("markov_head.joint_proj.weight", 3 * rank, 2 * rank + hidden)
        parts["joint_bias"] = take("markov_head.joint_proj.bias", 3 * rank)
    if kind not in ("none", *KERNELS):
        head = HEADS[kind](vocab, rank, hidden, outputs).to(target.device)
        for name, own in head.named_parameters():
            if name not in ("markov_w1.weight", "markov_w2.weight"):
                own.data = take(f"markov_head.{name}", *own.shape)
        parts["step"] = head.step
    if setting(config, "enable_confidence_head", bool, directory, False):
        with_markov: bool = setting(config, "confidence_head_with_markov", bool, directory, False)
        if with_markov and not rank:
            raise LoadError(f"{source}: confidence_head_with_markov needs a Markov head, but markov_rank is 0")
        parts["confidence_weight"] = take("confidence_head.proj.weight", 1, hidden + (rank if with_markov else 0))[0]
        parts["confidence_bias"] = float(take("confidence_head.proj.bias", 1)[0])
        parts["confidence_with_markov"] = with_markov
    return HeadWeights(kind=cast(HeadKind, kind if kind in ("none", *KERNELS) else "custom"), **parts)
