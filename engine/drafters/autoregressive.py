"""What drafters that decode one token after the other share: absorbing one token ahead, and the drafting loop.

Row i reads a state and the token after it, x_{i+1}, attends to rows 0 … i and predicts x_{i+2}. A row of the context
starts from the target's feature at i; a drafted row starts from what the row before it left. The row at n−1, just
before the anchor at n, therefore predicts x_1 as soon as it is absorbed, and drafting x_k takes rows n … n+k−2. Those
write their keys and values to the pages like any others; absorbing the accepted tokens overwrites them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Places
from pathlib import Path
from typing import Any

import torch

from engine.allocator import zeros_on_demand
from engine.batch import indices, page_table, part_of
from engine.config import PAGE_SIZE
from engine.drafters.attachment import check_sizes, read_head
from engine.models.decoder import DecoderModel
from engine.models.layers import new_cache, page_bytes, read_geometry
from engine.models.loader import Checkpoint, read_json
from engine.sampling import sampling_rows
from engine.types import DraftBlock, Sequence, StepPlan, Verdict
from kernels.decoder_layer import LayerCache, Rows
from kernels.markov_sample import HeadWeights, markov_sample
from kernels.rope import rope_table


class AutoregressiveDrafter(ABC):
    """The part of a drafter that does not depend on its layers.

    Raises:
        LoadError: config.json does not fit the target; names the key.
    """

    kind: str
    head = "none"
    has_confidence = False
    lookahead = 1
    feature_layers: tuple[int, ...]

    def __init__(self, directory: Path, target: DecoderModel) -> None:
        self.directory = directory
        self.target = target
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self.geometry = g = read_geometry(self.config, directory)
        check_sizes(g, target, directory)
        self.block_size = self.read_block_size()
        self.rope = rope_table(target.max_length + self.block_size, g.head_dim, g.rope_theta, target.device)
        self.caches: list[LayerCache] = []
        # The latest absorbed row's state, by slot: preemption and prefix hits need no care of their own.
        self.states = torch.empty(0)

    def read_vocabulary(self, checkpoint: Checkpoint) -> None:
        """lm_head, and which of the target's tokens its rows stand for.

        Raises:
            LoadError: a map, size or copy that does not fit; names the tensor or key.
        """
        self.lm_head, ids = read_head(checkpoint, self.config, self.target)
        self.no_head = HeadWeights(ids=ids, vocabulary=self.geometry.vocab_size)

    @abstractmethod
    def read_block_size(self) -> int:
        """γ from config.json."""

    @abstractmethod
    def enter(self, features: torch.Tensor) -> torch.Tensor:
        """The states [T, D] from which context rows start, from the target's features [T, len(feature_layers) · D]."""

    @abstractmethod
    def advance(self, state: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Run rows from states [T, D] and following tokens [T], storing their K and V -> the states they leave."""

    @abstractmethod
    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Draft logits float32 from what rows left [T, D]: a column for each row of lm_head."""

    @property
    def page_bytes(self) -> int:
        g, target = self.geometry, self.target
        return page_bytes(g, g.layers, target.dtype) + PAGE_SIZE * g.hidden_size * target.activations.itemsize

    def allocate(self, pages: int) -> None:
        g, dtype, device = self.geometry, self.target.dtype, self.target.device
        self.caches = [new_cache(g, pages, dtype, device) for _ in range(g.layers)]
        self.states = zeros_on_demand((pages * PAGE_SIZE, g.hidden_size), self.target.activations, device)

    def absorb(self, plan: StepPlan, verdict: Verdict, chosen: Places[int] | None = None) -> None:
        """Run the layers on every kept row i, with feature_i and the committed token_{i+1}."""
        if chosen is not None:
            plan, verdict = part_of(plan, verdict, chosen)
        assert verdict.features is not None
        batch = verdict.batch
        offsets = batch.query_offsets.tolist()
        kept: list[int] = []
        last: list[int] = []
        following: list[int] = []
        for index, row in enumerate(plan.rows):
            sequence = row.sequence
            assert sequence.absorbed == row.start, "the drafter's context has holes"
            if verdict.failed[index]:  # ends now, and has no following token
                continue
            count = row.count - row.draft_length + verdict.accepted[index]
            sequence.absorbed = row.start + count
            kept += range(offsets[index], offsets[index] + count)
            last.append(offsets[index] + count - 1)
            token = verdict.next_token[index]
            following.append(sequence.tokens[row.start + count] if token is None else token)
        if not kept:
            return
        device = verdict.features.device
        ends = indices(last, device)
        tokens = batch.input_ids.roll(-1)
        tokens[ends] = indices(following, device)
        features, positions, owners, slots = verdict.features, batch.positions, batch.row_sequence, batch.slots
        last_slots = slots.index_select(0, ends)
        if len(kept) != features.shape[0]:
            front = indices(kept, device)
            features, tokens, positions, owners, slots = (
                t.index_select(0, front) for t in (features, tokens, positions, owners, slots)
            )
            ends = torch.searchsorted(front, ends)
        state = self.advance(self.enter(features), tokens, Rows(positions, owners, slots, batch.page_table))
        self.states.index_copy_(0, last_slots, state.index_select(0, ends))

    def propose(self, sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        """Draft `length` tokens, by default γ, for each sequence, one step for all of them at a time.

        A block is drafted as far as its sequence's pages reach: the scheduler grants what may be verified. Tokens
        past that are 0 with a log_z of NaN, which verification never keeps on the draft's word.
        """
        for sequence in sequences:
            assert sequence.absorbed == sequence.kv_length, "the drafter's context has holes"
        length = self.block_size if length is None else length
        device, size = self.target.device, (len(sequences), length)
        sampling = sampling_rows(sequences, device)
        tokens = torch.zeros(size, dtype=torch.int64, device=device)
        log_z = torch.full(size, torch.nan, device=device)
        logits = torch.empty(*size, self.geometry.vocab_size, device=device) if sampling.any_rejection else None

        reach = indices([len(s.pages) * PAGE_SIZE - s.kv_length + 1 for s in sequences], device)  # tokens, at least 1
        anchors = indices([s.kv_length for s in sequences], device)
        proposals = indices([s.proposals for s in sequences], device)
        latest = indices([s.anchor for s in sequences], device)
        table = page_table(sequences, device)
        active = torch.arange(len(sequences), device=device)
        state = self.states.index_select(0, _slots(table, anchors - 1))
        shortest = int(reach.min())
        for k in range(length):
            if k >= shortest:
                going = (reach > k).nonzero().flatten()
                if not len(going):
                    break
                state, latest, anchors, proposals, table, active, reach = (
                    t.index_select(0, going) for t in (state, latest, anchors, proposals, table, active, reach)
                )
                sampling = sampling.take(going)
                shortest = int(reach.min())
            if k:
                positions = anchors + (k - 1)
                owners = torch.arange(len(positions), device=device)
                state = self.advance(state, latest, Rows(positions, owners, _slots(table, positions), table))
            base, inner = self.logits(state)[:, None], state[:, None].float()
            sample = markov_sample(base, inner, latest, self.no_head, sampling, anchors + k, proposals)
            latest = sample.tokens[:, 0].contiguous()
            tokens[active, k] = latest
            log_z[active, k] = sample.log_z[:, 0]
            if logits is not None and sample.logits is not None:
                logits[active, k] = sample.logits[:, 0]
        return DraftBlock(sequences, tokens, None, logits, log_z)


def _slots(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Slots [R] of positions [R] under a page table [R, pages]."""
    return table.gather(1, (positions // PAGE_SIZE)[:, None])[:, 0] * PAGE_SIZE + positions % PAGE_SIZE
