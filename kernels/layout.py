"""Rows of a round, laid out flat: one native pass over numbers that Python gathered."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np

from kernels.jit import entry, native
from kernels.simd import load_int

# Columns of what `lay_out` is given of each row.
START, COUNT, DRAFTED, DRAFT_ROW, WANTS_LOGITS, PROPOSALS, PAGES, HELD, COLUMNS = range(9)
# And of those that draft. PAGES and BLOCK_PAGES are addresses: of as many int64 as the column behind says.
ANCHOR, POSITION, PROPOSAL, BLOCK_PAGES, BLOCK_HELD, BLOCK_COLUMNS = range(6)


@native
def lay(given: np.ndarray, rows: int, drafts: np.ndarray, page_size: int, width: int, total: int, out: np.ndarray):
    """Fill `out` with, one after the other: token ids [T], positions [T], row numbers [T], cache slots [T], row offsets
    [R + 1], offsets of their logits [R + 1], page table [R, width], −1 padded, the flat rows that want logits [L]; and
    of the D rows that do, the draft's length [D], its row [D] (−1 without one), the position of the first token decided
    [D], proposals [D], and offsets among the L [D + 1].

    Args:
        given: int64: COLUMNS numbers a row, then all rows' committed tokens.
        drafts: [D, γ] int64, drafted tokens; a row's DRAFTED last tokens are the first of drafts[DRAFT_ROW].
        width: at least the most pages of a row.
        total: T, the sum of COUNT.
    """
    token = rows * COLUMNS
    positions, owners, slots, offsets = total, 2 * total, 3 * total, 4 * total
    logit_offsets = offsets + rows + 1
    table = logit_offsets + rows + 1
    logit_rows = table + rows * width
    wanted = 0
    for row in range(rows):
        wanted += given[row * COLUMNS + WANTS_LOGITS]
    lengths = out.shape[0] - 5 * wanted - 1
    draft_rows, firsts, proposals, ends = (
        lengths + wanted,
        lengths + 2 * wanted,
        lengths + 3 * wanted,
        lengths + 4 * wanted,
    )
    out[offsets] = out[logit_offsets] = out[ends] = 0
    at, logits, decided = 0, 0, 0
    for row in range(rows):
        own = row * COLUMNS
        start, count, drafted = given[own + START], given[own + COUNT], given[own + DRAFTED]
        pages, held = given[own + PAGES], given[own + HELD]
        for place in range(width):
            out[table + row * width + place] = load_int(pages + 8 * place) if place < held else -1
        for place in range(count):
            position = start + place
            if place < count - drafted:
                out[at] = given[token]
                token += 1
            else:
                out[at] = drafts[given[own + DRAFT_ROW], place - (count - drafted)]
            out[positions + at] = position
            out[owners + at] = row
            page = out[table + row * width + position // page_size]
            out[slots + at] = page * page_size + position % page_size
            if given[own + WANTS_LOGITS] and place >= count - drafted - 1:
                out[logit_rows + logits] = at
                logits += 1
            at += 1
        if given[own + WANTS_LOGITS]:
            out[lengths + decided], out[draft_rows + decided] = drafted, given[own + DRAFT_ROW]
            out[firsts + decided], out[proposals + decided] = start + count - drafted, given[own + PROPOSALS]
            decided += 1
            out[ends + decided] = logits
        out[offsets + row + 1] = at
        out[logit_offsets + row + 1] = logits


@entry
def lay_out(given: np.ndarray, rows: int, drafts: np.ndarray, page_size: int, width: int, total: int, out: np.ndarray):
    """`lay`, called from Python."""
    lay(given, rows, drafts, page_size, width, total, out)


@native
def lay_blocks(
    given: np.ndarray, rows: int, slots: int, mask: int, first: int, length: int, width: int, out: np.ndarray
):
    """Fill `out` with anchors [R], positions [R], proposals [R], the tokens of their blocks [R, slots], page table
    [R, width], −1 padded, and which of all slots predict [R, length].

    Args:
        given: int64: BLOCK_COLUMNS numbers a row.
        mask: what stands in a block behind its anchor.
        first: the slot that predicts the first drafted token.
    """
    tokens = 3 * rows
    table = tokens + rows * slots
    predicting = table + rows * width
    for row in range(rows):
        own = row * BLOCK_COLUMNS
        out[row], out[rows + row], out[2 * rows + row] = (
            given[own + ANCHOR],
            given[own + POSITION],
            given[own + PROPOSAL],
        )
        for slot in range(slots):
            out[tokens + row * slots + slot] = mask if slot else given[own + ANCHOR]
        pages, held = given[own + BLOCK_PAGES], given[own + BLOCK_HELD]
        for place in range(width):
            out[table + row * width + place] = load_int(pages + 8 * place) if place < held else -1
        for slot in range(length):
            out[predicting + row * length + slot] = row * slots + first + slot


@entry
def lay_out_blocks(
    given: np.ndarray, rows: int, slots: int, mask: int, first: int, length: int, width: int, out: np.ndarray
):
    """`lay_blocks`, called from Python."""
    lay_blocks(given, rows, slots, mask, first, length, width, out)


@entry
def front_rows(offsets: np.ndarray, counts: np.ndarray, out: np.ndarray) -> None:
    """The first counts[r] rows from offsets[r] on, of all r one after the other, into `out` [Σ counts]."""
    at = 0
    for row in range(counts.shape[0]):
        for place in range(counts[row]):
            out[at] = offsets[row] + place
            at += 1
