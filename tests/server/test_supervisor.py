"""An engine that dies, hangs or does not come back, and what the service notices of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engine.errors import LoadError
from server import supervisor
from server.streams import EngineFailed
from server.worker import Worker
from tests.server.conftest import until
from tests.server.fake_engine import EngineThread, ScriptedEngine, info
from tests.server.test_worker import read, request


class Spawner:
    """Starts the given engines one after the other; a string is an engine that does not load, and says so."""

    def __init__(self, *engines: ScriptedEngine | str) -> None:
        self._engines: Iterator[ScriptedEngine | str] = iter(engines)
        self.children: list[EngineThread] = []
        self.times: list[float] = []

    def __call__(self) -> EngineThread:
        engine = next(self._engines)
        refusal = engine if isinstance(engine, str) else ""
        scripted = engine if isinstance(engine, ScriptedEngine) else ScriptedEngine([1])
        self.children.append(EngineThread(scripted, info(100), refusal=refusal))
        self.times.append(time.monotonic())
        return self.children[-1]


@pytest.fixture
def stuck() -> Iterator[Callable[[], ScriptedEngine]]:
    """Engines whose first round does not end before the test does."""
    gates: list[threading.Semaphore] = []

    def make() -> ScriptedEngine:
        gates.append(threading.Semaphore(0))
        return ScriptedEngine([1], gate=gates[-1])

    yield make
    for gate in gates:
        gate.release(10_000)


async def test_an_engine_that_dies_fails_everybody_at_once_and_comes_back(stuck: Callable[[], ScriptedEngine]) -> None:
    spawner = Spawner(stuck(), ScriptedEngine([1]))
    heard: list[bool] = []
    worker = Worker(spawner, on_ready=heard.append)
    await worker.start()
    streams = [worker.open(request(str(n))) for n in range(5)]
    answer = asyncio.ensure_future(worker.stats())
    await asyncio.sleep(0)
    spawner.children[0].kill()
    for stream in streams:
        with pytest.raises(EngineFailed, match="lost"):
            await asyncio.wait_for(read(stream), 1)
        worker.close(stream, finished=False)
    with pytest.raises(EngineFailed):
        await answer
    await until(lambda: worker.ready)
    assert len(await read(worker.open(request()))) == 7
    assert heard == [True, False, True]
    await worker.stop()


async def test_silence_counts_as_a_hang_and_idleness_does_not(stuck: Callable[[], ScriptedEngine]) -> None:
    spawner = Spawner(stuck(), ScriptedEngine([1]))
    worker = Worker(spawner, hang_s=0.2)
    await worker.start()
    await asyncio.sleep(0.5)
    assert worker.ready
    with pytest.raises(EngineFailed):
        await read(worker.open(request()))
    await until(lambda: worker.ready)
    assert spawner.children[0].ended() == "killed"
    assert len(await read(worker.open(request()))) == 7
    await worker.stop()


async def test_attempts_to_restart_are_spaced_ever_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.1)
    spawner = Spawner(ScriptedEngine([1]), *["no such tensor"] * 4, ScriptedEngine([1]))
    worker = Worker(spawner)
    await worker.start()
    spawner.children[0].kill()
    await until(lambda: len(spawner.children) == 6 and worker.ready)
    pauses = [after - before for before, after in zip(spawner.times[1:], spawner.times[2:], strict=False)]
    for pause, least in zip(pauses, (0.05, 0.1, 0.1, 0.1), strict=True):
        assert pause >= least
    await worker.stop()


async def test_an_engine_that_cannot_be_had_is_a_load_error(stuck: Callable[[], ScriptedEngine]) -> None:
    with pytest.raises(LoadError, match="no such tensor"):
        await Worker(Spawner("no such tensor")).start()


async def test_stopping_while_the_engine_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SHORTEST_PAUSE_S", 60.0)
    spawner = Spawner(ScriptedEngine([1]), "not this time")
    worker = Worker(spawner)
    await worker.start()
    spawner.children[0].kill()
    await until(lambda: not worker.ready)
    with pytest.raises(EngineFailed) as error:
        worker.open(request())
    assert error.value.retry_after_s > 0
    with pytest.raises(EngineFailed):
        await worker.stats()
    await asyncio.wait_for(worker.stop(), 5)
