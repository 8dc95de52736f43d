"""StepPlan → Batch: the ragged rows of a round, flat."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from engine.config import PAGE_SIZE
from engine.types import Batch, DraftBlock, Sequence, StepPlan


def indices(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 [n] on the device; much cheaper than torch.tensor for the short lists of a round."""
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    return tensor if device.type == "cpu" else tensor.to(device)


def joined_arrays(values: Rows[list[int]]) -> list[np.ndarray]:
    """Each list as an int64 array, parts of one: a round makes many short ones."""
    flat = np.array([value for part in values for value in part], dtype=np.int64)
    parts, start = [], 0
    for part in values:
        parts.append(flat[start : start + len(part)])
        start += len(part)
    return parts


def joined_indices(values: Rows[list[int]], device: torch.device) -> list[torch.Tensor]:
    """`indices` of each list, parts of one copy."""
    parts = [torch.from_numpy(part) for part in joined_arrays(values)]
    return parts if device.type == "cpu" else [part.to(device) for part in parts]


def page_table(sequences: Rows[Sequence], device: torch.device) -> torch.Tensor:
    """[R, max pages] int64, padded with −1."""
    width = max((len(sequence.pages) for sequence in sequences), default=0)
    table = np.full((len(sequences), max(width, 1)), -1, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.pages)] = sequence.pages
    tensor = torch.from_numpy(table)
    return tensor if device.type == "cpu" else tensor.to(device)


def build_batch(plan: StepPlan, block: DraftBlock | None, device: torch.device) -> Batch:
    """Lay out the plan's rows in order: committed tokens first, then the drafted ones of each sequence."""
    drafts = {id(s): row for row, s in enumerate(block.sequences)} if block is not None else {}
    drafted_tokens = block.tokens.tolist() if block is not None else []
    ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    offsets = [0]
    logit_offsets = [0]
    followed = 0
    for index, row in enumerate(plan.rows):
        committed = row.count - row.draft_length
        ids += row.sequence.tokens[row.start : row.start + committed]
        if row.draft_length:
            ids += drafted_tokens[drafts[id(row.sequence)]][: row.draft_length]
        span = range(row.start, row.start + row.count)
        pages = row.sequence.pages
        positions += span
        slots += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in span]
        owners += [index] * row.count
        end = offsets[-1] + row.count
        followed += row.sequence.followed
        if row.needs_token:
            logit_rows += range(end - 1 - row.draft_length, end)
        offsets.append(end)
        logit_offsets.append(len(logit_rows))
    lists = (ids, positions, offsets, owners, slots, logit_rows, logit_offsets)
    ids_, positions_, offsets_, owners_, slots_, logit_rows_, logit_offsets_ = joined_indices(lists, device)
    table = page_table([row.sequence for row in plan.rows], device)
    kept = None
    if 0 < followed < len(plan.rows):
        kept = indices([int(row.sequence.followed) for row in plan.rows for _ in range(row.count)], device)
    return Batch(ids_, positions_, offsets_, owners_, slots_, table, logit_rows_, logit_offsets_, kept)
