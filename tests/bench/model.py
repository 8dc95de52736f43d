"""A target and its drafter with random weights, as deep as the real ones, and one round of theirs stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.context import ContextWeights, store_context
from kernels.forward import BlockRows, Ends, LayerStack, Rows, forward
from kernels.markov_sample import HeadWeights, markov_sample
from kernels.matmul import PackedMatrix, pack
from kernels.select_lengths import select_lengths
from kernels.verify import verify
from tests.bench.layer_ops import attention_flops, context, last_rows, layer
from tests.bench.measure import DEMO
from tests.bench.registry import Sizes, embedded
from tests.bench.sampling_ops import sampling, target_tokens


@dataclass(frozen=True)
class Depth:
    """What a model's shapes leave open."""

    layers: int
    draft_layers: int
    capture: tuple[int, ...]  # layers whose outputs the drafter absorbs


@dataclass(frozen=True)
class Stage:
    """A stage of a round, and what it cannot do without."""

    run: Callable[[], object]
    bytes: float
    flops: float = 0.0
    reset: Callable[[], object] | None = None


QWEN3 = {"4b": (2560, 9728, 32, 36), "8b": (4096, 12288, 32, 36), "14b": (5120, 17408, 40, 40)}


def qwen3(name: str, device: torch.device) -> tuple[Sizes, Depth]:
    """Qwen3's dense models with the published drafters' five layers, block of 7 and rank 256."""
    hidden, intermediate, heads, layers = QWEN3[name]
    shape = (hidden, intermediate, heads, 8, 128, 151_936, 256, 7)
    sizes = Sizes(*shape, torch.bfloat16, device, (1, 8, 32, 64, 128, 256), (1024,), 2048, triton=True)
    return sizes, Depth(layers, 5, tuple(layers * (2 * i + 1) // 10 for i in range(5)))


def embedded_model() -> tuple[Sizes, Depth]:
    target = json.loads((DEMO / "target" / "config.json").read_text())
    draft = json.loads((DEMO / "dspark" / "config.json").read_text())
    return embedded(), Depth(target["num_hidden_layers"], draft["num_hidden_layers"], tuple(draft["target_layer_ids"]))


class Model:
    """Random weights; embedding and head are tied, and shared with the drafter."""

    def __init__(self, sizes: Sizes, depth: Depth) -> None:
        self.sizes, self.depth = sizes, depth
        s = sizes
        table = s.normal(s.vocabulary, s.hidden)
        gains = torch.ones(s.hidden, dtype=s.dtype, device=s.device)
        self.ends = Ends(table, gains, 1e-6, pack(table * s.hidden**-0.5))
        self.layers = tuple(layer(s) for _ in range(depth.layers))
        self.draft_layers = tuple(layer(s) for _ in range(depth.draft_layers))
        self.fc = self._matrix(s.hidden, len(depth.capture) * s.hidden)
        self.kv = self._matrix(depth.draft_layers * 2 * s.kv_heads * s.head_dim, s.hidden)
        self.k_norms = torch.ones(depth.draft_layers, s.head_dim, dtype=s.dtype, device=s.device)
        w1, w2 = s.normal(s.vocabulary, s.rank, dtype=torch.float32), s.normal(s.vocabulary, s.rank).bfloat16()
        confidence = s.normal(s.hidden + s.rank, dtype=torch.float32) * s.hidden**-0.5
        self.head = HeadWeights("vanilla", w1, w2, confidence_weight=confidence)

    def _matrix(self, n: int, k: int) -> PackedMatrix:
        return pack(self.sizes.normal(n, k) * k**-0.5)


class Round:
    """One round of `requests` requests with `length` tokens of context each, whole blocks verified.

    Args:
        accepted: how many drafted tokens each request keeps.
        mode: of sampling: greedy, coupled or rejection.
    """

    def __init__(self, model: Model, length: int, accepted: Sequence[int], mode: str) -> None:
        s, depth = model.sizes, model.depth
        requests, each = len(accepted), s.block + 1
        self.model, self.length, self.requests = model, length, requests
        grown = length + each
        pairs = [context(s, requests, grown) for _ in range(depth.layers + depth.draft_layers)]
        table, rope = pairs[0][1:]
        caches = tuple(pair[0] for pair in pairs)
        self.stack = LayerStack(model.layers, caches[: depth.layers])
        self.draft_stack = LayerStack(model.draft_layers, caches[depth.layers :])
        self.weights = ContextWeights(model.fc, model.ends.norm, model.kv, model.k_norms, 1e-6, caches[depth.layers :])
        self.rope, self.rules = rope, sampling(s, range(requests), mode)
        self.rows, self.row = last_rows(s, table, grown, each), last_rows(s, table, grown, 1)
        self.block = BlockRows(torch.full((requests,), length, device=s.device), table, s.block)
        self.masks = s.integers(s.vocabulary, requests * s.block)
        self.inputs, self.anchors = s.integers(s.vocabulary, requests * each), s.integers(s.vocabulary, requests)
        self.index = torch.arange(requests, device=s.device)
        last = length + torch.tensor(accepted, device=s.device)
        self.kept = (self.rows.positions <= last[self.rows.row_sequence]).nonzero().flatten()
        self._decide(accepted, mode)

    def _decide(self, accepted: Sequence[int], mode: str) -> None:
        """Drafted tokens of which just the first `accepted` are what the target picks."""
        s = self.model.sizes
        logits, _, self.features = self.target()
        self.logits, self.original = logits, logits.clone()
        greedy = "greedy" if mode == "rejection" else mode
        picks = target_tokens(s, logits.clone(), self.requests, greedy)[:, :-1]
        slots = torch.arange(s.block, device=s.device)
        missed = slots >= torch.tensor(accepted, device=s.device)[:, None]
        self.drafted = torch.where(missed, (picks + 1) % s.vocabulary, picks).contiguous()
        self.draft = (None, None)
        if mode == "rejection":  # the draft's law is the target's, or where it is to miss, all on its own token
            own = self.original.view(self.requests, s.block + 1, -1)[:, :-1]
            own = own - own.amax(-1, keepdim=True)
            sure = torch.full_like(own, -torch.inf).scatter_(-1, self.drafted[..., None], 0.0)
            law = torch.where(missed[..., None], sure, own).contiguous()
            self.draft = (law, law.logsumexp(-1))
        self.base, self.hidden, _ = self.propose()

    def target(self, rows: Rows | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = rows or self.rows
        tokens = self.inputs[: len(rows.positions)]
        capture = self.model.depth.capture if rows is self.rows else ()
        return forward(tokens, self.model.ends, self.stack, self.rope, rows, capture)

    def propose(self) -> tuple[Tensor, Tensor, None]:
        return forward(self.masks, self.model.ends, self.draft_stack, self.rope, self.block)

    def sample(self) -> object:
        shape = (self.requests, self.model.sizes.block, -1)
        hidden = self.hidden.float().view(shape)
        arguments = (self.model.head, self.rules, self.block.anchor_positions, self.index)
        return markov_sample(self.base.view(shape), hidden, self.anchors, *arguments)

    def accept(self) -> tuple[Tensor, Tensor, Tensor]:
        each = self.model.sizes.block + 1
        offsets = torch.arange(self.requests + 1, device=self.drafted.device) * each
        lengths = torch.full_like(self.index, each - 1)
        places = torch.zeros_like(self.index)
        # Positions and seeds as `target_tokens` counts them.
        arguments = (lengths, *self.draft, self.index, self.rules, self.index, places)
        return verify(self.logits, offsets, self.drafted, *arguments)

    def absorb(self) -> None:
        assert self.features is not None
        everything = (self.features, self.rows.positions, self.rows.slots)
        features, positions, slots = (t.index_select(0, self.kept) for t in everything)
        store_context(features, self.weights, self.rope, positions, slots)

    def select(self) -> object:
        s = self.model.sizes
        confidence = torch.full((self.requests, s.block), 0.8, device=s.device)
        limits = torch.full_like(self.index, s.block)
        return select_lengths(confidence, torch.ones(self.requests, device=s.device), limits, limits.sum() // 2)

    def plain(self) -> None:
        """A round of plain decoding."""
        logits, _, _ = self.target(self.row)
        offsets, none = torch.arange(self.requests + 1, device=logits.device), torch.zeros_like(self.index)
        drafted = torch.zeros((self.requests, 0), dtype=torch.int64, device=logits.device)
        verify(logits, offsets, drafted, none, None, None, none, self.rules, self.index, none)

    def stages(self) -> dict[str, Stage]:
        """In their order; bytes of weights, of keys and values read, and of logits written or read once."""
        s, depth, r, each = self.model.sizes, self.model.depth, self.requests, self.model.sizes.block + 1
        item, head = s.dtype.itemsize, s.vocabulary * s.hidden
        logits = 4.0 * s.vocabulary * r
        forward_size = depth.layers * s.layer_weights + head
        draft_size = depth.draft_layers * s.layer_weights + head
        read = s.kv_bytes(r * self.length)
        kept = len(self.kept)
        absorbed = self.model.fc.n * self.model.fc.k + self.model.kv.n * self.model.kv.k

        def attention(rows: int, layers: int) -> float:
            return layers * attention_flops(s, rows, self.length)

        return {
            "draft": Stage(
                self.propose,
                draft_size * item + depth.draft_layers * read + logits * s.block,
                2.0 * draft_size * r * s.block + attention(r * s.block, depth.draft_layers),
            ),
            "head": Stage(
                self.sample,
                2 * s.block * s.vocabulary * s.rank + logits * s.block,
                2.0 * r * s.block * s.vocabulary * s.rank,
            ),
            "select": Stage(self.select, 8 * r * s.block),
            "verify": Stage(
                self.target,
                forward_size * item + depth.layers * read + logits * each,
                2.0 * forward_size * r * each + attention(r * each, depth.layers),
            ),
            "accept": Stage(self.accept, logits * each, reset=lambda: self.logits.copy_(self.original)),
            "absorb": Stage(self.absorb, absorbed * item + kept * self.model.fc.k * item, 2.0 * absorbed * kept),
            "plain": Stage(
                self.plain,
                forward_size * item + depth.layers * read + 2 * logits,
                2.0 * forward_size * r + attention(r, depth.layers),
            ),
        }
