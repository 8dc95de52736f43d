"""Threads of the native kernels, restored after each test that changes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels import threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = threads.get_threads()
    threads.set_threads(3)
    yield
    threads.set_threads(before)
