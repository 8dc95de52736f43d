"""Helper threads: any caller may use them, and they cost nothing while idle."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from kernels import threads
from kernels.matmul import matmul, pack
from tests.kernels.layers import same_bits


def test_callers_on_several_python_threads(three_threads: None) -> None:
    packed, x = pack(torch.randn(640, 48)), torch.randn(5, 48)
    expected = matmul(x, packed)
    wrong: list[int] = []

    def call(caller: int) -> None:
        for _ in range(200):
            if not same_bits(matmul(x, packed), expected):
                wrong.append(caller)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_idle_helpers_sleep(three_threads: None) -> None:
    matmul(torch.randn(2, 32), pack(torch.randn(64, 32)))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_the_count_can_change_at_any_time() -> None:
    packed, x = pack(torch.randn(320, 32)), torch.randn(3, 32)
    before, expected = threads.get_threads(), matmul(x, packed)
    for count in (2, 4, 1, 3):
        threads.set_threads(count)
        assert threads.get_threads() == count
        assert same_bits(matmul(x, packed), expected)
    threads.set_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        threads.set_threads(0)
