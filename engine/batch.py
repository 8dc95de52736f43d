"""StepPlan → Batch: the ragged rows of a round, flat."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import chain

import numpy as np
import torch

from engine.config import PAGE_SIZE
from engine.types import Batch, DraftBlock, Sequence, StepPlan
from kernels.layout import lay_out

_NO_TOKENS = np.zeros((0, 0), np.int64)


def indices(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 [n] on the device; much cheaper than torch.tensor for the short lists of a round."""
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    return tensor if device.type == "cpu" else tensor.to(device)


def joined_arrays(values: Rows[list[int]]) -> list[np.ndarray]:
    """Each list as an int64 array, parts of one: a round makes many short ones."""
    flat = np.fromiter(chain.from_iterable(values), np.int64, sum(map(len, values)))
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
    count = len(plan.rows)
    given: list[int] = []
    tokens: list[int] = []
    pages: list[int] = []
    total = wanted = followed = 0
    width = 1
    windowed = False
    for row in plan.rows:
        sequence, start, drafted = row.sequence, row.start, row.draft_length
        own, committed = sequence.pages, row.count - drafted
        place = drafts[id(sequence)] if drafted else -1
        given += (start, row.count, drafted, place, row.needs_token, len(own))
        if committed == 1:
            tokens.append(sequence.tokens[start])
        else:
            tokens += sequence.tokens[start : start + committed]
        pages += own
        width = max(width, len(own))
        windowed = windowed or bool(sequence.window_pages)
        total += row.count
        followed += sequence.followed
        if row.needs_token:
            wanted += 1 + drafted
    given += tokens
    given += pages
    flat = np.empty(4 * total + 2 * (count + 1) + count * width + wanted, np.int64)
    drafted_tokens = _NO_TOKENS if block is None else block.tokens.cpu().numpy()
    lay_out(np.array(given, np.int64), count, drafted_tokens, PAGE_SIZE, width, total, flat)
    sizes = (total, total, total, total, count + 1, count + 1, count * width, wanted)
    parts = torch.from_numpy(flat).split_with_sizes(sizes)
    if device.type != "cpu":  # one by one: Triton compiles a kernel anew for a pointer that is not aligned to 16 bytes
        parts = tuple(part.to(device) for part in parts)
    ids, positions, owners, slots, offsets, logit_offsets, table, logit_rows = parts
    kept = None
    if 0 < followed < count:
        kept = indices([int(row.sequence.followed) for row in plan.rows for _ in range(row.count)], device)
    window_slots = window_table = None
    if windowed:
        window_slots, window_table = _windows(plan, flat, total, width, device)
    return Batch(
        ids, positions, offsets, owners, slots, table.view(count, width), logit_rows, logit_offsets, kept,
        window_slots, window_table,
    )  # fmt: skip


def _windows(
    plan: StepPlan, flat: np.ndarray, total: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots [T] and page table [R, width] of layers with a window."""
    table = np.zeros((len(plan.rows), width), np.int64)
    for number, row in enumerate(plan.rows):
        table[number, : len(row.sequence.window_pages)] = row.sequence.window_pages
    positions, owners = flat[total : 2 * total], flat[2 * total : 3 * total]
    slots = table[owners, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    found = torch.from_numpy(slots), torch.from_numpy(table)
    return found if device.type == "cpu" else (found[0].to(device), found[1].to(device))
