"""What passes between two rounds is counted: who forgets it believes many short rounds cheaper than few long ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.schedule import native_round
from tests.engine.helpers import load, request

TICK = 1e-3


class Clock:
    """A millisecond passes whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += TICK
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(target_dir: Path, clock: Clock) -> Engine:
    engine = load(target_dir)
    engine.clock = engine.scheduler.planner.clock = clock
    return engine


def measured(engine: Engine) -> float:
    engine.step()
    return engine.history.last(1)[0].measured_s


def test_what_passes_between_rounds_belongs_to_the_next(engine: Engine, clock: Clock) -> None:
    engine.submit(request("a", range(5), 20))
    engine.step()
    usual = measured(engine)
    assert measured(engine) == pytest.approx(usual)
    clock.now += 4 * TICK
    assert measured(engine) == pytest.approx(usual + 4 * TICK)
    assert measured(engine) == pytest.approx(usual)


def test_a_standstill_and_idle_time_do_not_count(engine: Engine, clock: Clock) -> None:
    engine.submit(request("a", range(5), 4))
    engine.step()
    usual = measured(engine)
    clock.now += 1000.0
    assert usual < measured(engine) < 3 * usual
    while engine.has_work:
        engine.step()
    clock.now += 1000.0
    engine.submit(request("b", range(5), 4))
    engine.step()  # the prompt
    assert engine.history.last(1)[0].measured_s < 2 * usual


def test_what_learning_takes_is_counted_in_the_next_round(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.submit(request("a", range(5), 20))
    engine.step()
    decided = [(measured(engine), engine.history.last(1)[0].decide_s)[1] for _ in range(2)]
    assert decided[0] == pytest.approx(decided[1])
    observe, late = native_round.observe, [7 * TICK]

    def observe_slowly(*given: Any) -> Any:
        clock.now += late.pop() if late else 0.0
        return observe(*given)

    monkeypatch.setattr(native_round, "observe", observe_slowly)
    engine.step()
    measured(engine)
    assert engine.history.last(1)[0].decide_s == pytest.approx(decided[1] + 7 * TICK)
    measured(engine)
    assert engine.history.last(1)[0].decide_s == pytest.approx(decided[1])
