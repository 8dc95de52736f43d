"""StepPlan → Batch: the ragged rows of a round, flat."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from engine.config import PAGE_SIZE
from engine.types import Batch, DraftBlock, Sequence, StepPlan


def page_table(sequences: Rows[Sequence], device: torch.device) -> torch.Tensor:
    """[R, max pages] int64, padded with −1."""
    width = max((len(sequence.pages) for sequence in sequences), default=0)
    table = np.full((len(sequences), max(width, 1)), -1, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.pages)] = sequence.pages
    return torch.from_numpy(table).to(device)


def build_batch(plan: StepPlan, block: DraftBlock | None, device: torch.device) -> Batch:
    """Lay out the plan's rows in order: committed tokens first, then the drafted ones of each sequence."""
    drafts = {id(s): row for row, s in enumerate(block.sequences)} if block is not None else {}
    drafted_tokens = block.tokens.tolist() if block is not None else []
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    logit_rows: list[int] = []
    offsets = [0]
    logit_offsets = [0]
    for index, row in enumerate(plan.rows):
        committed = row.count - row.draft_length
        ids += row.sequence.tokens[row.start : row.start + committed]
        if row.draft_length:
            ids += drafted_tokens[drafts[id(row.sequence)]][: row.draft_length]
        positions += range(row.start, row.start + row.count)
        owners += [index] * row.count
        end = offsets[-1] + row.count
        if row.needs_token:
            logit_rows += range(end - 1 - row.draft_length, end)
        offsets.append(end)
        logit_offsets.append(len(logit_rows))
    table = page_table([row.sequence for row in plan.rows], torch.device("cpu"))
    position = torch.tensor(positions, dtype=torch.int64)
    owner = torch.tensor(owners, dtype=torch.int64)
    pages = table[owner, position // PAGE_SIZE]
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64).to(device),
        positions=position.to(device),
        query_offsets=torch.tensor(offsets, dtype=torch.int64).to(device),
        row_sequence=owner.to(device),
        slots=(pages * PAGE_SIZE + position % PAGE_SIZE).to(device),
        page_table=table.to(device),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64).to(device),
        logit_offsets=torch.tensor(logit_offsets, dtype=torch.int64).to(device),
    )
