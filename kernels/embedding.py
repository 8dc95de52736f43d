"""Rows of an embedding."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.jit import entry, native
from kernels.simd import load, load_float, load_int, load_wide, load_wide_float, splat, store, store_float


def embedding(table: Tensor, ids: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rows `ids` [T] int64 of table [V, H], as [T, H] of `dtype`, times `scale`.

    Raises:
        ValueError: an id lies outside the table.
    """
    item = table.dtype.itemsize
    if not table.is_cpu or dtype != torch.float32 or table.dtype not in (torch.float32, torch.bfloat16):
        rows = table.index_select(0, ids).to(dtype)
        return rows if scale == 1.0 else rows * scale
    out = table.new_empty((ids.shape[0], table.shape[1]), dtype=dtype)
    if not _gather(ids.shape[0], ids.data_ptr(), *table.shape, table.data_ptr(), item, scale, out.data_ptr()):
        raise ValueError("an id lies outside the embedding")
    return out


@entry
def _gather(rows, ids, count, width, table, item, scale, out):
    return gather_rows(rows, ids, count, width, table, item, scale, out)


@native
def gather_rows(rows, ids, count, width, table, item, scale, out):
    """Rows of a table [count, width] of `item` bytes an entry, times `scale`, to float32 rows.

    False where an id lies outside.
    """
    single = np.float32(scale)
    factor = splat(single)
    for row in range(rows):
        token = load_int(ids + 8 * row)
        if token < 0 or token >= count:
            return False
        source, to = table + token * width * item, out + row * width * 4
        whole = width // 16 * 16
        for column in range(0, whole, 16):
            entries = load_wide(source + 2 * column) if item == 2 else load(source + 4 * column)
            store(to + 4 * column, entries * factor)
        for column in range(whole, width):
            value = load_wide_float(source + 2 * column) if item == 2 else load_float(source + 4 * column)
            store_float(to + 4 * column, value * single)
    return True
