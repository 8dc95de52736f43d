"""What the process asks of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.allocator import take_at_once, zeros_on_demand

CPU = torch.device("cpu")
STATUS = Path("/proc/self/statm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_on_demand_are_zeros_on_cache_lines_of_their_own(dtype: torch.dtype) -> None:
    made = zeros_on_demand((3, 5, 7), dtype, CPU)
    assert torch.equal(made, torch.zeros(3, 5, 7, dtype=dtype)) and made.dtype == dtype
    assert made.is_contiguous() and made.data_ptr() % 64 == 0
    made[1] = 2.0
    assert float(made.float().sum()) == 70.0


def test_no_room_for_no_pages() -> None:
    assert zeros_on_demand((0, 4), torch.float32, CPU).shape == (0, 4)


def resident_pages() -> int:
    return int(STATUS.read_text().split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_zeros_on_demand_take_memory_where_they_are_written() -> None:
    size = 512 * 2**20
    before = resident_pages()
    made = zeros_on_demand((size,), torch.uint8, CPU)
    assert (resident_pages() - before) * 4096 < size // 8
    made[: size // 2] = 1
    assert (resident_pages() - before) * 4096 > size // 4


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_of_several_caches_an_equal_share_is_there_at_once() -> None:
    """And stays as it was."""
    size = 128 * 2**20
    before = resident_pages()
    made = [zeros_on_demand((4, size // 8), torch.bfloat16, CPU) for _ in range(2)]
    made[1][0, 5] = 3.0
    take_at_once(made, size)
    assert 0.9 * size < (resident_pages() - before) * 4096 < 1.4 * size
    assert float(made[1][0, 5]) == 3.0 and float(made[0].float().abs().sum()) == 0.0
    take_at_once([*made, torch.zeros(3, 4).T, torch.empty(0)])
    assert (resident_pages() - before) * 4096 > 1.9 * size
