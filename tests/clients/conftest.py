"""The service's fixtures: a scripted server in this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.server.conftest import checkpoint, directory, launch, vocab_size

__all__ = ["checkpoint", "directory", "launch", "vocab_size"]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard here and in children; what runs in the background may have been started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
