"""What is loaded is passed over by the collector of cycles; what comes later is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.collector import YOUNG, pass_over_what_stays


@pytest.fixture
def usual() -> Iterator[None]:
    """The collector as it was, afterwards."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class Node:
    """Something that can be in a cycle."""

    def __init__(self) -> None:
        self.own = self


def test_what_is_loaded_is_passed_over_and_later_cycles_are_not(usual: None) -> None:
    old = Node()
    pass_over_what_stays()
    assert gc.get_freeze_count() > 1000 and gc.get_threshold()[0] == YOUNG
    assert not any(one is old for one in gc.get_objects())
    gone = weakref.ref(Node())
    assert gone() is not None
    nodes = [Node() for _ in range(2 * YOUNG)]  # enough for a collection
    assert gone() is None and len(nodes) == 2 * YOUNG
    gc.collect()
    assert old.own is old
