"""Embedding rows, widened to float32."""

from __future__ import annotations

import pytest
import torch

from kernels.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 16, 50, 320])
def test_rows_are_exact(dtype: torch.dtype, width: int) -> None:
    table = torch.randn(33, width).to(dtype)
    ids = torch.tensor([0, 32, 5, 5])
    assert torch.equal(embedding(table, ids, torch.float32), table[ids].float())


def test_ids_outside_are_refused() -> None:
    table = torch.randn(4, 16)
    for token in (-1, 4):
        with pytest.raises(ValueError, match="outside"):
            embedding(table, torch.tensor([0, token]), torch.float32)
