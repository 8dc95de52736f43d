"""Rows of a round, laid out flat: one native pass over numbers that Python gathered."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np

from kernels.jit import entry

# Columns of what `lay_out` is given of each row.
START, COUNT, DRAFTED, DRAFT_ROW, WANTS_LOGITS, PAGES, COLUMNS = range(7)


@entry
def lay_out(given: np.ndarray, rows: int, drafts: np.ndarray, page_size: int, width: int, total: int, out: np.ndarray):
    """Fill `out` with, one after the other: token ids [T], positions [T], row numbers [T], cache slots [T], row offsets
    [R + 1], offsets of their logits [R + 1], page table [R, width], −1 padded, and the flat rows that want logits [L].

    Args:
        given: int64: COLUMNS numbers a row, then all rows' committed tokens, then all rows' pages.
        drafts: [D, γ] int64, drafted tokens; a row's DRAFTED last tokens are the first of drafts[DRAFT_ROW].
        width: at least the most pages of a row.
        total: T, the sum of COUNT.
    """
    token = rows * COLUMNS
    page = token
    for row in range(rows):
        page += given[row * COLUMNS + COUNT] - given[row * COLUMNS + DRAFTED]
    positions, owners, slots, offsets = total, 2 * total, 3 * total, 4 * total
    logit_offsets = offsets + rows + 1
    table = logit_offsets + rows + 1
    logit_rows = table + rows * width
    out[offsets] = out[logit_offsets] = 0
    at, logits = 0, 0
    for row in range(rows):
        own = row * COLUMNS
        start, count, drafted, held = given[own + START], given[own + COUNT], given[own + DRAFTED], given[own + PAGES]
        for place in range(width):
            out[table + row * width + place] = given[page + place] if place < held else -1
        for place in range(count):
            position = start + place
            if place < count - drafted:
                out[at] = given[token]
                token += 1
            else:
                out[at] = drafts[given[own + DRAFT_ROW], place - (count - drafted)]
            out[positions + at] = position
            out[owners + at] = row
            out[slots + at] = given[page + position // page_size] * page_size + position % page_size
            if given[own + WANTS_LOGITS] and place >= count - drafted - 1:
                out[logit_rows + logits] = at
                logits += 1
            at += 1
        page += held
        out[offsets + row + 1] = at
        out[logit_offsets + row + 1] = logits
