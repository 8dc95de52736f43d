"""A plan laid out flat: against the same thing said in plain Python."""

from __future__ import annotations

import random
from array import array
from itertools import accumulate

import pytest
import torch

from engine.batch import build_batch, build_draft_rows, front_indices
from engine.config import PAGE_SIZE
from engine.types import (
    DraftBlock,
    EndConditions,
    PlanRow,
    Request,
    Sampling,
    Sequence,
    StepPlan,
    Verification,
)

CPU = torch.device("cpu")
BLOCK = 4


def _sequence(rng: random.Random, length: int, slack: int) -> Sequence:
    tokens = [rng.randrange(1000) for _ in range(length)]
    sequence = Sequence(
        Request(str(rng.random()), tuple(tokens), EndConditions(9), Sampling()), 0, Verification.REJECTION, tokens, 0
    )
    sequence.pages = array("q", rng.sample(range(10_000), -(-(length + slack) // PAGE_SIZE)))
    sequence.followed, sequence.proposals = rng.random() < 0.7, rng.randrange(99)
    return sequence


def _random_plan(seed: int) -> tuple[StepPlan, DraftBlock | None]:
    rng = random.Random(seed)
    rows: list[PlanRow] = []
    drafting: list[Sequence] = []
    for _ in range(rng.randrange(6)):
        length = rng.randrange(1, 60)
        sequence = _sequence(rng, length, BLOCK)
        if rng.random() < 0.5:  # decodes, perhaps with a draft
            drafted = rng.randrange(BLOCK + 1)
            if rng.random() < 0.7:
                drafting.append(sequence)
            else:
                drafted = 0
            rows.append(PlanRow(sequence, length - 1, 1 + drafted, drafted))
        else:  # a chunk of its prompt
            start = rng.randrange(length)
            count = rng.randrange(1, length - start + 1)
            rows.append(PlanRow(sequence, start, count, 0, start + count == length))
    block = None
    if drafting:
        rng.shuffle(drafting)
        tokens = torch.tensor([[rng.randrange(1000) for _ in range(BLOCK)] for _ in drafting])
        block = DraftBlock(tuple(drafting), tokens, None, None, None)
    return StepPlan(tuple(rows)), block


@pytest.mark.parametrize("seed", range(40))
def test_rows_lie_flat(seed: int) -> None:
    plan, block = _random_plan(seed)
    batch = build_batch(plan, block, CPU)
    width = max((len(row.sequence.pages) for row in plan.rows), default=1)
    assert batch.page_table.shape == (len(plan.rows), width)
    ends, at = batch.query_offsets.tolist(), 0
    logit_rows: list[int] = []
    for index, row in enumerate(plan.rows):
        sequence, committed = row.sequence, row.count - row.draft_length
        drafts: list[int] = []
        if block is not None and row.draft_length:
            drafts = block.tokens[block.sequences.index(sequence), : row.draft_length].tolist()
        mine = slice(at, at + row.count)
        span = range(row.start, row.start + row.count)
        assert (ends[index], ends[index + 1]) == (at, at + row.count)
        assert batch.input_ids[mine].tolist() == sequence.tokens[row.start : row.start + committed] + drafts
        assert batch.positions[mine].tolist() == list(span)
        assert batch.row_sequence[mine].tolist() == [index] * row.count
        assert batch.slots[mine].tolist() == [
            sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for position in span
        ]
        padding = [-1] * (width - len(sequence.pages))
        assert batch.page_table[index].tolist() == [*sequence.pages, *padding]
        assert batch.logit_offsets[index] == len(logit_rows)
        if row.needs_token:
            logit_rows += range(at + row.count - 1 - row.draft_length, at + row.count)
        at += row.count
    assert len(batch.input_ids) == at and batch.logit_rows.tolist() == logit_rows
    assert batch.logit_offsets[-1] == len(logit_rows)
    asked, deciding = batch.decided, [row for row in plan.rows if row.needs_token]
    assert asked.lengths.tolist() == [row.draft_length for row in deciding]
    assert asked.positions.tolist() == [row.start + row.count - row.draft_length for row in deciding]
    assert asked.proposals.tolist() == [row.sequence.proposals for row in deciding]
    assert asked.offsets.tolist() == [0, *accumulate(1 + row.draft_length for row in deciding)]
    for row, place in zip(deciding, asked.draft_rows.tolist(), strict=True):
        assert place == -1 if not row.draft_length else block is not None and block.sequences[place] is row.sequence
    followed = [row.sequence.followed for row in plan.rows]
    wanted = [int(row.sequence.followed) for row in plan.rows for _ in range(row.count)]
    assert batch.kept is None if all(followed) or not any(followed) else batch.kept.tolist() == wanted


@pytest.mark.parametrize(("first", "length"), [(0, 4), (1, 3), (1, 4), (2, 1)])
def test_blocks_lie_flat(first: int, length: int) -> None:
    rng, slots, mask = random.Random(first), 5, 77
    sequences = [_sequence(rng, rng.randrange(2, 60), BLOCK) for _ in range(4)]
    for sequence in sequences:
        sequence.kv_length = len(sequence.tokens) - 1
    rows = build_draft_rows(sequences, slots, mask, first, length, CPU)
    assert rows.anchors.tolist() == [sequence.tokens[-1] for sequence in sequences]
    assert rows.positions.tolist() == [sequence.kv_length for sequence in sequences]
    assert rows.proposals.tolist() == [sequence.proposals for sequence in sequences]
    assert rows.tokens.view(4, slots).tolist() == [[sequence.tokens[-1], *[mask] * 4] for sequence in sequences]
    assert rows.predicting.tolist() == [r * slots + first + k for r in range(4) for k in range(length)]
    width = max(len(sequence.pages) for sequence in sequences)
    padded = [[*sequence.pages, *[-1] * (width - len(sequence.pages))] for sequence in sequences]
    assert rows.page_table.tolist() == padded


def test_the_front_of_each_stretch() -> None:
    offsets = torch.tensor([0, 3, 4, 9])
    assert front_indices(offsets, [2, 1, 4]).tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert front_indices(offsets, [0, 0, 0]).tolist() == []
