"""Lengths of a round's blocks: by the policy's compiled rule, or by the policy itself where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule import native_round
from engine.schedule.books import Books
from engine.schedule.cost import LiveCost, work_of
from engine.schedule.finished import STOPS, Blocks
from engine.schedule.lengths import Candidate
from engine.schedule.policies import AdaptiveLengths, LengthPolicy, RelayedLengths, Round, StaticLengths
from engine.types import DraftBlock, SpeculationMode

Array = np.ndarray
_NONE = np.zeros(0)
_NO_CONFIDENCE = np.zeros((0, 1), np.float32)


def choose(
    desk: Array,
    block: DraftBlock,
    blocks: Blocks,
    policy: LengthPolicy,
    books: Books,
    memory: Array,
    cost: LiveCost,
    everybodys: Array,
    prefill: int,
    copied: int,
    tokens: float,
) -> None:
    """Fill in `blocks`: what confidences are worth, lengths, and why they are no longer.

    Args:
        desk: see `native_desk`; books, memory (the gate's) and cost lie on it.
        everybodys: [decoding requests] their contexts.
        prefill, copied: rows of prompts and of copies in the round.
        tokens: Σ of the decoding requests' weights.
    """
    confidence = _NO_CONFIDENCE
    if block.host is not None:
        confidence = _NO_CONFIDENCE if block.host.confidence is None else block.host.confidence
    elif block.confidence is not None:
        confidence = (block.confidence if block.confidence.is_cpu else block.confidence.cpu()).numpy()
    given = confidence, blocks.slots, blocks.contexts, blocks.limits, everybodys, prefill, copied, blocks.curves
    if policy.rule is None:
        work = np.empty(c.WORK)
        native_round.survive(desk, *given, work)
        _read(block, blocks, policy, books, cost, work, tokens, memory)
        blocks.context = float(work[c.DRAFT_CONTEXT])
        return
    asked = policy.asked if isinstance(policy, AdaptiveLengths) else policy
    assert isinstance(asked, StaticLengths)
    past: tuple[Any, int] = (_NONE, 0)
    gains = _NONE
    if isinstance(policy, RelayedLengths):
        gains = np.empty(blocks.curves[0].size)
        past = policy.past[0] if len(policy.past) == 2 else past
    blocks.stop, blocks.context = native_round.lengths(
        desk,
        *given,
        policy.rule,
        b.FIXED if asked.mode is SpeculationMode.FIXED else b.THRESHOLD_MODE,
        -1 if asked.draft_tokens is None else asked.draft_tokens,
        asked.threshold,
        tokens,
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
