"""Lengths of a round's blocks: by the policy's compiled rule, or by the policy itself where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_lengths
from engine.schedule.books import Books
from engine.schedule.cost import LiveCost, work_of
from engine.schedule.finished import STOPS, Blocks
from engine.schedule.lengths import Candidate
from engine.schedule.policies import AdaptiveLengths, LengthPolicy, RelayedLengths, Round, StaticLengths
from engine.types import DraftBlock, SpeculationMode

Array = np.ndarray
_NONE = np.zeros(0)


def choose(
    block: DraftBlock,
    blocks: Blocks,
    policy: LengthPolicy,
    books: Books,
    cost: LiveCost,
    work: Array,
    tokens: float,
    memory: Array,
) -> None:
    """Fill `blocks.lengths` and say why it stopped.

    Args:
        work: the round with ℓ = 0 (`native_cost`); changed.
        tokens: Σ of the decoding requests' weights.
        memory: the gate's (`native_books`).
    """
    if policy.rule is None:
        _read(block, blocks, policy, books, cost, work, tokens, memory)
        return
    asked = policy.asked if isinstance(policy, AdaptiveLengths) else policy
    assert isinstance(asked, StaticLengths)
    past: tuple[Any, int] = (_NONE, 0)
    gains = _NONE
    if isinstance(policy, RelayedLengths):
        gains = np.empty(blocks.survival.size)
        past = policy.past[0] if len(policy.past) == 2 else past
    blocks.stop = native_lengths.choose(
        policy.rule,
        b.FIXED if asked.mode is SpeculationMode.FIXED else b.THRESHOLD_MODE,
        -1 if asked.draft_tokens is None else asked.draft_tokens,
        asked.threshold,
        blocks.conditional,
        blocks.survival,
        blocks.slots,
        blocks.limits,
        blocks.contexts,
        books.whole,
        books.real,
        *cost.arrays,
        work,
        tokens,
        float(memory[b.PRICE]),
        float(memory[b.DECAY]),
        *past,
        gains,
        blocks.lengths,
    )
    if isinstance(policy, RelayedLengths):
        ours = int((books.whole[blocks.slots, b.MODE] == b.AUTO).sum())
        if ours:
            policy.past.append((gains[~np.isnan(gains)], ours))


def _read(
    block: DraftBlock,
    blocks: Blocks,
    policy: LengthPolicy,
    books: Books,
    cost: LiveCost,
    work: Array,
    tokens: float,
    memory: Array,
) -> None:
    """The choice of a policy that has no compiled form."""
    per_token = cost.table.row_context_s * cost.speed
    candidates = [
        Candidate(
            None if block.confidence is None else blocks.conditional[row].tolist(),
            int(blocks.limits[row]),
            sequence.request.speculation,
            blocks.survival[row].tolist(),
            float(books.real[sequence.slot, b.WEIGHT]),
            per_token * sequence.kv_length,
            bool(books.whole[sequence.slot, b.FREE]),
        )
        for row, sequence in enumerate(block.sequences)
    ]
    round_ = Round(work_of(work), cost, tokens, float(memory[b.PRICE]), float(memory[b.DECAY]))
    choice = policy.choose(candidates, round_)
    blocks.lengths[:] = choice.lengths
    blocks.stop = STOPS.index(choice.stop)
