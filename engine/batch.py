"""StepPlan → Batch: the ragged rows of a round, flat."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Rows
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from engine.config import PAGE_SIZE
from engine.types import Batch, Decided, DraftBlock, Sequence, StepPlan, Verdict
from kernels.host_draft import NO_TOKENS
from kernels.layout import front_rows, lay_out, lay_out_blocks


def indices(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 [n] on the device; much cheaper than torch.tensor for the short lists of a round."""
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    return tensor if device.type == "cpu" else tensor.to(device)


def front_indices(offsets: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """int64 [Σ counts]: of each stretch that begins at one of `offsets` [R + 1] the first `counts` rows."""
    chosen = np.empty(sum(counts), np.int64)
    front_rows(offsets.cpu().numpy(), np.array(counts, np.int64), chosen)
    return torch.from_numpy(chosen).to(offsets.device)


def page_table(sequences: Rows[Sequence], device: torch.device) -> torch.Tensor:
    """[R, max pages] int64, padded with −1."""
    width = max((len(sequence.pages) for sequence in sequences), default=0)
    table = np.full((len(sequences), max(width, 1)), -1, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.pages)] = sequence.pages
    tensor = torch.from_numpy(table)
    return tensor if device.type == "cpu" else tensor.to(device)


class Numbers(NamedTuple):
    """What `kernels.layout` wants to know of a plan's rows, and how many there are of what."""

    given: array[int]
    total: int  # rows
    wanted: int  # of them that have logits
    decided: int  # requests that get a token
    followed: int
    width: int  # the most pages of a request
    windowed: bool


def plan_numbers(plan: StepPlan, block: DraftBlock | None) -> Numbers:
    """Gather them; the only loop over requests that Python runs."""
    places = block.places if block is not None else {}
    given: list[int] = []
    tokens: list[int] = []
    total = wanted = followed = decided = 0
    width = 1
    windowed = False
    for row in plan.rows:
        sequence, start, drafted, needs = row.sequence, row.start, row.draft_length, row.needs_token
        committed = row.count - drafted
        address, held = sequence.pages.buffer_info()
        place = places[id(sequence)] if drafted else -1
        given += (start, row.count, drafted, place, needs, sequence.proposals, address, held)
        if committed == 1:
            tokens.append(sequence.tokens[start])
        else:
            tokens += sequence.tokens[start : start + committed]
        if held > width:
            width = held
        if sequence.window_pages:
            windowed = True
        total += row.count
        if sequence.followed:
            followed += 1
        if needs:
            decided += 1
            wanted += 1 + drafted
    given += tokens
    return Numbers(array("q", given), total, wanted, decided, followed, width, windowed)


def build_batch(
    plan: StepPlan, block: DraftBlock | None, device: torch.device, numbers: Numbers | None = None
) -> Batch:
    """Lay out the plan's rows in order: committed tokens first, then the drafted ones of each sequence.

    Args:
        numbers: what `plan_numbers` gathered, if somebody asked already.
    """
    numbers = plan_numbers(plan, block) if numbers is None else numbers
    given, total, wanted, decided, followed, width, windowed = numbers
    count = len(plan.rows)
    sizes = [total, total, total, total, count + 1, count + 1, count * width, wanted]
    asked = 5 * decided + 1
    flat = np.empty(sum(sizes) + asked, np.int64)
    drafted_tokens = NO_TOKENS if block is None else block.tokens.cpu().numpy()
    lay_out(np.frombuffer(given, np.int64), count, drafted_tokens, PAGE_SIZE, width, total, flat)
    parts = torch.from_numpy(flat).split_with_sizes([*sizes, asked])
    if device.type != "cpu":  # one by one: Triton compiles a kernel anew for a pointer that is not aligned to 16 bytes
        parts = tuple(part.to(device) for part in parts)
    ids, positions, owners, slots, offsets, logit_offsets, table, logit_rows, _ = parts
    kept = kept_rows(plan, device) if 0 < followed < count else None
    window_slots = window_table = None
    if windowed:
        window_slots, window_table = _windows(plan, flat, total, width, device)
    last = flat[-asked:]
    lengths, draft_rows, firsts, proposals = (last[k * decided : (k + 1) * decided] for k in range(4))
    answers = Decided(lengths, draft_rows, firsts, proposals, last[4 * decided :])
    return Batch(
        ids, positions, offsets, owners, slots, table.view(count, width), logit_rows, logit_offsets, answers, kept,
        window_slots, window_table,
    )  # fmt: skip


def kept_rows(plan: StepPlan, device: torch.device) -> torch.Tensor:
    """int64 [T]: 0 where nobody wants a row's features."""
    return _kept(tuple([row.sequence.followed for row in plan.rows for _ in range(row.count)]), device)


@lru_cache(maxsize=64)  # the same requests decode for many rounds
def _kept(followed: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    return indices([int(one) for one in followed], device)


class DraftRows(NamedTuple):
    """What a block drafter runs on: R anchors, each in front of its block of slots."""

    anchors: torch.Tensor  # [R] int64
    positions: torch.Tensor  # [R] int64, the anchors'
    proposals: torch.Tensor  # [R] int64
    tokens: torch.Tensor  # [R · slots] int64: the anchor and masks
    page_table: torch.Tensor  # [R, max pages] int64, −1 padded
    predicting: torch.Tensor  # [R · length] int64: the slots that predict


def draft_numbers(sequences: Rows[Sequence]) -> tuple[array[int], int]:
    """What `kernels.layout` wants to know of each sequence that drafts, and the most pages of one."""
    width = 1
    given: list[int] = []
    for sequence in sequences:
        address, held = sequence.pages.buffer_info()
        given += (sequence.tokens[-1], sequence.kv_length, sequence.proposals, address, held)
        if held > width:
            width = held
    return array("q", given), width


def build_draft_rows(
    sequences: Rows[Sequence], slots: int, mask: int, first: int, length: int, device: torch.device
) -> DraftRows:
    """Lay out blocks of `slots` slots, of which `length` from `first` on predict."""
    count = len(sequences)
    given, width = draft_numbers(sequences)
    sizes = [count, count, count, count * slots, count * width, count * length]
    flat = np.empty(sum(sizes), np.int64)
    lay_out_blocks(np.frombuffer(given, np.int64), count, slots, mask, first, length, width, flat)
    parts = torch.from_numpy(flat).split_with_sizes(sizes)
    if device.type != "cpu":  # see `build_batch`
        parts = tuple(part.to(device) for part in parts)
    anchors, positions, proposals, tokens, table, predicting = parts
    return DraftRows(anchors, positions, proposals, tokens, table.view(count, width), predicting)


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


def _picker(rows: list[int], device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes these rows of a tensor: a view where they stand on end."""
    first, last = rows[0], rows[-1] + 1
    if last - first == len(rows):
        return lambda tensor: tensor[first:last]
    chosen = indices(rows, device)
    return lambda tensor: tensor.index_select(0, chosen)


def part_of(plan: StepPlan, verdict: Verdict, keep: Rows[int]) -> tuple[StepPlan, Verdict]:
    """The same round as if only these of its plan rows had run."""
    assert verdict.features is not None
    batch, device = verdict.batch, verdict.features.device
    offsets = batch.query_offsets.tolist()
    flat = [row for index in keep for row in range(offsets[index], offsets[index + 1])]
    ends, owners = [0], []
    for number, index in enumerate(keep):
        count = offsets[index + 1] - offsets[index]
        ends.append(ends[-1] + count)
        owners += [number] * count
    pick = _picker(flat, device)
    rows = tuple(plan.rows[index] for index in keep)
    none = indices([], device)
    part = batch._replace(
        input_ids=pick(batch.input_ids),
        positions=pick(batch.positions),
        query_offsets=indices(ends, device),
        row_sequence=indices(owners, device),
        slots=pick(batch.slots),
        page_table=page_table([row.sequence for row in rows], device),
        logit_rows=none,
        logit_offsets=indices([0] * (len(rows) + 1), device),
        kept=None,
    )

    return StepPlan(rows), Verdict(
        tuple(verdict.accepted[index] for index in keep),
        tuple(verdict.next_token[index] for index in keep),
        pick(verdict.features),
        part,
        tuple(verdict.logprobs[index] for index in keep),
        tuple(verdict.failed[index] for index in keep),
    )
