"""Lengths of a round's blocks: by the policy's compiled rule, or by the policy itself where it has none."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_round
from engine.schedule.books import Books
from engine.schedule.cost import LiveCost, work_of
from engine.schedule.finished import STOPS
from engine.schedule.lengths import Candidate
from engine.schedule.policies import AdaptiveLengths, LengthPolicy, RelayedLengths, Round, StaticLengths
from engine.schedule.sheet import Blocks, Sheet
from engine.types import DraftBlock, SpeculationMode

Array = np.ndarray
_NONE = np.zeros(0)


class Rule(NamedTuple):
    """A policy's compiled rule, and what it asks for of requests that ask for nothing themselves; `native_lengths`."""

    rule: int
    mode: int
    draft_tokens: int
    threshold: float


def rule_of(policy: LengthPolicy) -> Rule | None:
    """None of a policy that has none."""
    if policy.rule is None:
        return None
    asked = policy.asked if isinstance(policy, AdaptiveLengths) else policy
    assert isinstance(asked, StaticLengths)
    mode = b.FIXED if asked.mode is SpeculationMode.FIXED else b.THRESHOLD_MODE
    return Rule(policy.rule, mode, -1 if asked.draft_tokens is None else asked.draft_tokens, asked.threshold)


def choose(
    desk: int,
    block: DraftBlock,
    blocks: Blocks,
    sheet: Sheet,
    policy: LengthPolicy,
    rule: Rule | None,
    books: Books,
    memory: Array,
    cost: LiveCost,
    prefill: int,
    copied: int,
) -> None:
    """Fill in `blocks`: whose they are, what confidences are worth, lengths, and why they are no longer.

    Args:
        desk: its address, see `native_desk`; books, memory (the gate's) and cost lie on it.
        sheet: of those that decode.
        rule: the policy's, `rule_of`.
        prefill, copied: rows of prompts and of copies in the round.
    """
    held, count = None, len(blocks.sequences)
    if block.host is not None:
        confidences = block.host.confidences
    else:
        confidences, held = _confidences(block)
    given = desk, sheet.address, sheet.count, prefill, copied, blocks.address, count, blocks.length, confidences
    if rule is None:
        native_round.judge_blocks(*given)
        _read(block, blocks, sheet, policy, books, cost, memory)
    elif isinstance(policy, RelayedLengths):
        past, before = policy.past[0] if len(policy.past) == 2 else (_NONE, 0)
        gains = np.empty(count * blocks.length)
        numbers = past.ctypes.data, len(past), before, gains.ctypes.data
        blocks.stop = native_round.lengths(*given, *rule, *numbers)
        ours = int((books.whole[blocks.slots, b.MODE] == b.AUTO).sum())
        if ours:
            policy.past.append((gains[~np.isnan(gains)], ours))
    else:
        blocks.stop = native_round.lengths(*given, *rule, 0, 0, 0, 0)
    del held  # until here it was read


def _confidences(block: DraftBlock) -> tuple[int, object]:
    """Where they lie, 0 for nowhere, and what keeps them there."""
    if block.confidence is None:
        return 0, None
    held = block.confidence.cpu().float().contiguous()
    return held.data_ptr(), held


def _read(
    block: DraftBlock,
    blocks: Blocks,
    sheet: Sheet,
    policy: LengthPolicy,
    books: Books,
    cost: LiveCost,
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
            books.weight(sequence.slot),
            per_token * sequence.kv_length,
            bool(books.whole[sequence.slot, b.FREE]),
        )
        for row, sequence in enumerate(block.sequences)
    ]
    tokens = float(sheet.weights.sum())
    round_ = Round(work_of(sheet.work), cost, tokens, float(memory[b.PRICE]), float(memory[b.DECAY]))
    choice = policy.choose(candidates, round_)
    blocks.lengths[:] = choice.lengths
    blocks.stop = STOPS.index(choice.stop)
