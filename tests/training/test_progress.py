"""What a long command says of itself."""

from __future__ import annotations

import pytest

from engine.training import progress
from engine.training.progress import Progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's hand, to be moved."""
    hand = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: hand[0])
    return hand


def test_a_slow_first_step_says_nothing_about_the_others(now: list[float]) -> None:
    bar = Progress("train", 100, "steps")
    for done in range(1, 11):
        now[0] += 50.0 if done == 1 else 0.5  # the first one compiles
        bar.update(done, "loss 1")
    assert bar.line() == "train 10/100 steps · 2.00 steps/s · 0:45 left · loss 1"


def test_the_rate_is_the_last_minutes(now: list[float]) -> None:
    bar = Progress("train", 10_000, "steps", begun=1_000)
    for step in range(1, 401):
        now[0] += 1.0 if step <= 100 else 0.25
        bar.update(1_000 + step)
    assert bar.line() == "train 1,400/10,000 steps · 4.00 steps/s · 35:50 left"


def test_nothing_done_has_no_rate(now: list[float]) -> None:
    bar = Progress("data", 10, "answers")
    assert bar.line() == "data 0/10 answers · 0.00 answers/s"
    now[0] += 9
    assert bar.line() == "data 0/10 answers · 0.00 answers/s"
