"""Capturing: largest first, within limits, and what is left out runs all the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.device_rounds.graphs import CaptureLimits, CudaCapture, Graphs
from engine.device_rounds.round import Size
from engine.device_rounds.sizing import staircase
from engine.loading import warm_up
from tests.engine.device_rounds.helpers import load, rounds_of
from tests.engine.device_rounds.test_texts import requests, texts
from tests.engine.helpers import GREEDY, coupled, request, run

Drafters = Callable[..., Path]
SIZES = staircase(6, 4)


class FakeDevice:
    """A clock that runs a second a capture, and memory that the largest round fills."""

    def __init__(self) -> None:
        self.now, self.bytes = 0.0, 0
        self.ran: list[Size] = []
        self.captured: list[Size] = []
        self.replayed: list[Size] = []

    def run(self, size: Size) -> None:
        self.ran.append(size)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        call()
        size = self.ran[-1]
        self.captured.append(size)
        self.now += 1.0
        self.bytes = max(self.bytes, size.rows)

        def replay() -> None:
            self.replayed.append(size)
            self.now += size.rows / 100

        return replay

    def graphs(self) -> Graphs:
        return Graphs(self.run, self.capture, lambda: self.bytes, lambda: self.now)


def test_the_largest_size_comes_first_and_every_one_is_timed() -> None:
    device = FakeDevice()
    report = device.graphs().capture(SIZES, CaptureLimits())
    rows = [size.rows for size in device.captured]
    assert rows == sorted(rows, reverse=True) and rows[0] == 6 * 5
    assert set(report.captured) == set(SIZES) and not report.left_out
    assert report.bytes == 30 and report.seconds >= len(SIZES)
    assert report.replay_s == pytest.approx({size: size.rows / 100 for size in SIZES})


def test_time_that_is_up_leaves_out_the_rest_which_runs_without_a_graph() -> None:
    device = FakeDevice()
    graphs = device.graphs()
    report = graphs.capture(SIZES, CaptureLimits(seconds=3.0))
    assert 1 <= len(report.captured) <= 3
    assert [*report.captured, *report.left_out] == sorted(SIZES, key=lambda s: (s.rows, s.seats), reverse=True)
    assert report.as_dict()["left_out"] == [tuple(size) for size in report.left_out]
    device.ran.clear(), device.replayed.clear()
    graphs(report.captured[0])
    graphs(report.left_out[0])
    assert device.replayed == report.captured[:1] and device.ran == report.left_out[:1]


def test_a_size_that_takes_too_much_memory_is_given_up_and_smaller_ones_are_not() -> None:
    device = FakeDevice()

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        """Memory is taken as long as a graph is there that needs it."""
        replay = device.capture(call)
        device.bytes = 0
        alive.append(weakref.ref(replay))
        return replay

    def memory() -> int:
        rows = [size.rows for ref, size in zip(alive, device.captured, strict=True) if ref() is not None]
        return max(rows, default=0)

    alive: list[weakref.ref[Callable[[], None]]] = []
    report = Graphs(device.run, capture, memory, lambda: device.now).capture(SIZES, CaptureLimits(bytes=20))
    assert set(report.left_out) == {size for size in SIZES if size.rows > 20}
    assert set(report.captured) == {size for size in SIZES if size.rows <= 20}
    assert report.bytes == 20


def test_a_size_for_which_memory_is_short_is_given_up_and_smaller_ones_are_not() -> None:
    device = FakeDevice()

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        replay = device.capture(call)
        if device.ran[-1].rows > 20:
            raise torch.OutOfMemoryError
        return replay

    report = Graphs(device.run, capture).capture(SIZES, CaptureLimits())
    assert set(report.left_out) == {size for size in SIZES if size.rows > 20}
    assert set(report.captured) == {size for size in SIZES if size.rows <= 20}


def test_what_cannot_be_recorded_ends_capturing_and_rounds_are_called() -> None:
    device = FakeDevice()

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        replay = device.capture(call)
        if device.ran[-1].rows <= 20:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return replay

    graphs = Graphs(device.run, capture)
    report = graphs.capture(SIZES, CaptureLimits())
    assert report.error == "operation not permitted when stream is capturing"
    assert set(report.captured) == {size for size in SIZES if size.rows > 20}
    assert set(report.left_out) == {size for size in SIZES if size.rows <= 20}
    device.ran.clear()
    for size in report.left_out:
        graphs(size)
    assert device.ran == report.left_out


def test_without_graphs_rounds_are_called() -> None:
    device = FakeDevice()
    graphs = Graphs(device.run, None)
    assert not graphs.capture(SIZES, CaptureLimits()).captured
    graphs(SIZES[0])
    assert device.ran == [SIZES[0]]


def test_capturing_runs_every_size_while_nobody_is_seated(target_dir: Path, drafter_dir: Drafters) -> None:
    """As on a GPU: all sizes run before the first request, and leave nothing behind."""
    engine = load(target_dir, drafter_dir(), policy="relayed", max_running=6)
    rounds = rounds_of(engine)
    calls: list[Callable[[], None]] = []

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        call()
        calls.append(call)
        return call

    rounds.graphs._capture = capture
    before = [cache.k[: engine.pool.total].clone() for cache in engine.target.caches]
    report = rounds.capture()
    assert len(calls) == len(report.captured) == len(rounds.sizing.sizes)
    for cache, old in zip(engine.target.caches, before, strict=True):
        assert torch.equal(cache.k[: engine.pool.total], old), "a page of the pool was written"
    assert rounds.sizing.seconds(report.captured[0]) == pytest.approx(report.replay_s[report.captured[0]])
    plain = load(target_dir)
    assert texts(run(engine, requests(8))) == texts(run(plain, requests(8)))
    engine.check()


def test_warming_up_captures(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), max_running=4)
    seen: list[CaptureLimits | None] = []
    rounds = rounds_of(engine)
    capture = rounds.capture

    def watched(limits: CaptureLimits | None = None) -> object:
        seen.append(limits)
        return capture(limits)

    rounds.capture = watched  # type: ignore[method-assign, assignment]
    warm_up(engine)
    assert len(seen) == 1 and not engine.has_work and engine.rounds == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_replay_on_a_gpu(target_dir: Path, drafter_dir: Drafters) -> None:
    """Captured for real: texts are those of rounds that the host runs on the same device."""
    options = {"device": "cuda", "dtype": "float32", "policy": "fixed", "max_running": 6}
    todo = [request(str(i), range(3 + 5 * i), 40, GREEDY if i % 2 else coupled(i)) for i in range(12)]
    ordinary, engine = (load(target_dir, drafter_dir(), **options) for _ in range(2))
    rounds_of(ordinary).paused = True
    report = rounds_of(engine).capture()
    assert set(report.captured) == set(rounds_of(engine).sizing.sizes)
    found, expected = run(engine, todo), run(ordinary, todo)
    assert texts(found) == texts(expected)
    assert rounds_of(engine).seating.launched > 10


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def pool(self) -> str:
        return f"pool of {id(self)}"

    def replay(self) -> None:
        pass


def test_a_capture_warms_up_aside_and_shares_the_pool_of_graphs_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    pools: list[str | None] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            self.name = "aside" if device is not None else "current"

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

        def synchronize(self) -> None:
            happened.append(f"host waits for {self.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        happened.append(f"on {stream.name}")
        yield

    @contextmanager
    def recording(graph: FakeGraph, pool: str | None, stream: Stream) -> Iterator[None]:
        happened.append(f"recording on {stream.name}")
        pools.append(pool)
        yield
        happened.append("recorded")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    capture = CudaCapture(torch.device("cuda", 0))
    first = capture(lambda: happened.append("call"))
    assert happened == [
        "aside waits for current", "on aside", "call", "call", "host waits for aside",
        "recording on aside", "call", "recorded", "current waits for aside",
    ]  # fmt: skip
    second = capture(lambda: None)
    assert pools[0] is None and pools[1] == first.__self__.pool()  # type: ignore[attr-defined]
    del first, second
    capture(lambda: None)
    assert pools[2] is None, "a pool goes with the last graph that is kept"
