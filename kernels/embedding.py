"""Rows of an embedding."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import entry, native
from kernels.simd import load, load_float, load_int, load_wide, load_wide_float, store, store_float


def embedding(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [T] int64 of table [V, H], as [T, H] of `dtype`.

    Raises:
        ValueError: an id lies outside the table.
    """
    item = table.dtype.itemsize
    if not table.is_cpu or dtype != torch.float32 or table.dtype not in (torch.float32, torch.bfloat16):
        return table.index_select(0, ids).to(dtype)
    out = table.new_empty((ids.shape[0], table.shape[1]), dtype=dtype)
    if not _gather(ids.shape[0], ids.data_ptr(), *table.shape, table.data_ptr(), item, out.data_ptr()):
        raise ValueError("an id lies outside the embedding")
    return out


@entry
def _gather(rows, ids, count, width, table, item, out):
    return gather_rows(rows, ids, count, width, table, item, out)


@native
def gather_rows(rows, ids, count, width, table, item, out):
    """Rows of a table [count, width] of `item` bytes an entry to float32 rows; False where an id lies outside."""
    for row in range(rows):
        token = load_int(ids + 8 * row)
        if token < 0 or token >= count:
            return False
        source, to = table + token * width * item, out + row * width * 4
        whole = width // 16 * 16
        for column in range(0, whole, 16):
            store(to + 4 * column, load_wide(source + 2 * column) if item == 2 else load(source + 4 * column))
        for column in range(whole, width):
            value = load_wide_float(source + 2 * column) if item == 2 else load_float(source + 4 * column)
            store_float(to + 4 * column, value)
    return True
