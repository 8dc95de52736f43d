"""Every value that flows through a round. None changes but `Sequence`; shapes stand in the comments.

Those that hold no tensors come from `engine.messages`, which a process without PyTorch can import.

R is the number of sequences in a round, T the number of flat rows, γ the block length, V the vocabulary.
Nothing in here knows gRPC, asyncio, text or devices' kernels.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.messages import (
    EndConditions,
    FinishReason,
    Request,
    Sampling,
    Speculation,
    SpeculationMode,
    TokenDelta,
    TokenLogprob,
    Verification,
)

if TYPE_CHECKING:
    from engine.lookup import Passages
    from kernels.host_draft import HostDraft

__all__ = [
    "Batch",
    "Decided",
    "DraftBlock",
    "EndConditions",
    "FinishReason",
    "Phase",
    "PlanRow",
    "Request",
    "Sampling",
    "Sequence",
    "Speculation",
    "SpeculationMode",
    "StepPlan",
    "TokenDelta",
    "TokenLogprob",
    "Verdict",
    "Verification",
]


class Phase(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state in the engine. Only `commit` and `schedule` change it (`absorbed`: the drafter).

    Invariant between rounds: target and drafter caches hold exactly positions 0 … kv_length−1. In DECODE
    kv_length = len(tokens) − 1: the last committed token is the anchor, not yet in any cache.
    """

    request: Request
    seed: int
    verification: Verification
    tokens: list[int]  # prompt and output
    arrival: int  # order of submission, kept through preemption
    phase: Phase = Phase.WAITING
    kv_length: int = 0
    absorbed: int = 0  # positions whose features the drafter has; its `absorb` advances it
    followed: bool = True  # its features are kept: it may draft. Otherwise `absorbed` stays behind for good
    looks: int = 0  # blocks that it drafts to show whether drafting would pay
    pages: array[int] = field(default_factory=lambda: array("q"))  # rounds read them where they lie
    window_pages: list[int] = field(default_factory=list)  # of layers with a window, as far as they are not GONE
    window_start: int = 0  # the first of them that is not
    prompt_length: int = 0
    proposals: int = 0  # blocks drafted so far; never reset
    output_counts: dict[int, int] = field(default_factory=dict)  # kept when penalties ask for it
    page_hashes: list[bytes] = field(default_factory=list)  # of the pages published in the prefix cache
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    announced: bool = False
    preemptions: int = 0
    slot: int = -1  # its row in the scheduler's books while it decodes
    passages: Passages | None = None  # where its runs of tokens last ended, once somebody looked

    @property
    def deferred(self) -> int:
        """Positions whose features the drafter has not: they wait in the backlog, or were never kept."""
        return self.kv_length - self.absorbed

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def anchor(self) -> int:
        return self.tokens[-1]


@dataclass(slots=True, eq=False)  # not frozen, like PlanRow
class DraftBlock:
    """One proposal for the sequences that draft this round; row i of each tensor is `sequences[i]`. Never changed."""

    sequences: tuple[Sequence, ...]
    tokens: torch.Tensor  # [R, γ] int64
    confidence: torch.Tensor | None  # [R, γ] float32 in (0, 1), calibrated; None without a head
    # [R, γ, V] float32: temperature and filters applied, −inf where filtered. Rows of `tokens` beyond its own are
    # guesses that were drawn from no distribution.
    logits: torch.Tensor | None
    log_z: torch.Tensor | None  # [R, γ] float32: logsumexp of `logits`; p_d = exp(logits − log_z)
    # The same where native code drew it, until the drafter drafts again; None of a block that was made otherwise.
    host: HostDraft | None = field(init=False, default=None, repr=False)
    places: dict[int, int] = field(init=False, repr=False)  # id of a sequence → its row

    def __post_init__(self) -> None:
        self.places = {id(sequence): row for row, sequence in enumerate(self.sequences)}

    @property
    def length(self) -> int:
        """γ, or as much of it as was drafted."""
        return int(self.tokens.shape[1]) if self.host is None else self.host.words[2]

    def drawn_at(self, host: HostDraft) -> DraftBlock:
        """Itself, which lies there, too. Blocks that `dataclasses.replace` makes of it do not."""
        self.host = host
        return self


@dataclass(slots=True)  # not frozen: one a request is made every round, in a sixth of the time
class PlanRow:
    """One sequence's share of a round: `count` tokens from `start`, the last `draft_length` drafted. Never changed."""

    sequence: Sequence
    start: int  # position of the first row
    count: int  # rows: prompt-chunk length, or 1 + draft_length
    draft_length: int = 0
    needs_token: bool = True  # False for a chunk that is not the prompt's last
    drafted: int = 0  # block length proposed, whatever part of it is verified
    copied: int = 0  # tokens proposed by lookup instead of by the drafter, all verified


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which rows run this round."""

    rows: tuple[PlanRow, ...]


class Decided(NamedTuple):
    """What `kernels.verify` is asked: one entry for each of the D plan rows that need a token, int64 on the host."""

    lengths: np.ndarray  # [D] ℓ
    draft_rows: np.ndarray  # [D] row of the block, −1 where ℓ = 0
    positions: np.ndarray  # [D] of the first token decided
    proposals: np.ndarray  # [D]
    offsets: np.ndarray  # [D + 1] of their rows among those that have logits


_NONE = np.zeros(0, np.int64)
NOTHING_DECIDED = Decided(_NONE, _NONE, _NONE, _NONE, np.zeros(1, np.int64))  # by the host


class Batch(NamedTuple):
    """A plan as flat ragged tensors, ready for the target."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    query_offsets: torch.Tensor  # [R + 1] int64
    row_sequence: torch.Tensor  # [T] int64: which row of page_table
    slots: torch.Tensor  # [T] int64: page · page_size + offset
    page_table: torch.Tensor  # [R, max pages] int64, −1 padded
    logit_rows: torch.Tensor  # [L] int64: flat rows whose logits are needed
    logit_offsets: torch.Tensor  # [R + 1] int64: a sequence's rows within logit_rows
    decided: Decided = NOTHING_DECIDED
    kept: torch.Tensor | None = None  # [T] int64: 0 where nobody wants a row's features; None: all are wanted
    # The same for layers with a window, where these have pages of their own.
    window_slots: torch.Tensor | None = None
    window_table: torch.Tensor | None = None


class LaidOut(NamedTuple):
    """A plan as native code laid it out and ran it; all rows have logits. Made a batch where somebody asks for it."""

    flat: np.ndarray  # int64, the parts of a batch one after the other
    requests: int  # R
    total: int  # T
    width: int  # of the page table

    def batch(self) -> Batch:
        count, total = self.requests, self.total
        sizes = [total, total, total, total, count + 1, count + 1, count * self.width, total, 5 * count + 1]
        parts = torch.from_numpy(self.flat).split_with_sizes(sizes)
        ids, positions, owners, slots, offsets, logit_offsets, table, logit_rows, _ = parts
        return Batch(ids, positions, offsets, owners, slots, table.view(count, self.width), logit_rows, logit_offsets)


class Verdict(NamedTuple):
    """What the target decided, one entry per plan row."""

    accepted: tuple[int, ...]  # [R] drafted tokens kept
    next_token: tuple[int | None, ...]  # [R] None for a chunk that is not the prompt's last
    # [T, features] outputs of the layers that the drafter asked for, as far as kept; they stand until the next round.
    features: torch.Tensor | None
    rows: Batch | LaidOut  # as they ran
    logprobs: tuple[tuple[TokenLogprob, ...], ...]  # [R] one per kept token, when asked for
    failed: tuple[bool, ...]  # [R] the target's logits were not finite
    # Of the rows that need a token, in their order: the target's largest probability at the first position decided;
    # NaN where nobody worked it out.
    certainty: np.ndarray | None = None
    placed: bool = False  # features of the followed rows were written to `Verifier.place`, too

    @property
    def batch(self) -> Batch:
        return self.rows.batch() if isinstance(self.rows, LaidOut) else self.rows
