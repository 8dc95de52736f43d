"""Coupled seeds, bits of logits and greedy texts, at a size for every run of the tests."""

from __future__ import annotations

import pytest

from tests.lossless.arms import REAL
from tests.lossless.coupled import agreement, load
from tests.lossless.greedy import available, greedy
from tests.lossless.rows import invariance


def test_the_engine_says_that_seeds_are_reproducible_here() -> None:
    assert load().info.seed_reproducible


@pytest.mark.parametrize("drafter", REAL)
def test_a_seed_gives_one_text(drafter: str) -> None:
    """Off, fixed, threshold; alone, among others; preempted; from the prefix cache."""
    for found in agreement(60, drafter):
        assert found.passed, found


def test_logits_have_the_same_bits_in_every_company() -> None:
    for found in invariance(40):
        assert found.passed, found


@pytest.mark.skipif(not available(), reason="the embedded model is not trained yet")
def test_greedy_texts_equal_transformers() -> None:
    for found in greedy(4, 32):
        assert found.passed, found
