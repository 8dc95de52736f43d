"""Rounds captured in CUDA graphs, one a size, within a stated time and memory; sizes without one are run as they are.

Largest first: later graphs then live in the memory that the first took from their common pool. Where nothing can be
captured, on a CPU, every size is run as it is: the same calls in the same order.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.device_rounds.round import Size

MEBIBYTE = 2**20
Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]  # a function of no values -> what does the same from then on
WARM_RUNS = 2  # before a capture: kernels compile, libraries make their workspaces


@dataclass(frozen=True, slots=True)
class CaptureLimits:
    """What capturing may take."""

    seconds: float = 120.0
    bytes: int = 4096 * MEBIBYTE


@dataclass(slots=True)
class CaptureReport:
    """What capturing took, and what was left out."""

    captured: list[Size] = field(default_factory=list)
    left_out: list[Size] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0
    error: str = ""  # what ended it early
    replay_s: dict[Size, float] = field(default_factory=dict)  # of each captured size, nobody served

    def as_dict(self) -> dict[str, Any]:
        """For a log."""
        return {
            "captured": len(self.captured),
            "left_out": [tuple(size) for size in self.left_out],
            "seconds": round(self.seconds, 3),
            "bytes": self.bytes,
            "error": self.error,
        }


class Graphs:
    """Runs a round of any size, from a graph where there is one.

    Args:
        run: the round.
        capture: makes a replay of a call; None where there are no graphs.
        memory: bytes that the device has given out.
        settle: waits until the device is idle.
    """

    def __init__(
        self,
        run: Callable[[Size], None],
        capture: Capture | None,
        memory: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.perf_counter,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._capture, self._memory, self._clock, self._settle = capture, memory, clock, settle
        self._replays: dict[Size, Replay] = {}

    def __call__(self, size: Size) -> None:
        replay = self._replays.get(size)
        if replay is None:
            self._run(size)
        else:
            replay()

    def capture(self, sizes: Collection[Size], limits: CaptureLimits) -> CaptureReport:
        """Capture these sizes, largest first, as far as the limits go. Nobody may be seated: every size is run.

        A size that takes memory beyond the limit, or more than there is, is given up, and smaller ones are tried;
        once time is up, or where something cannot be recorded at all, the rest is left out.
        """
        report = CaptureReport()
        if self._capture is None:
            return report
        began, memory = self._clock(), self._memory()
        for size in sorted(sizes, key=lambda size: (size.rows, size.seats), reverse=True):
            if self._clock() - began >= limits.seconds:
                report.left_out.append(size)
                continue
            try:
                replay = self._capture(_call(self._run, size))
            except torch.OutOfMemoryError:  # before recording: a warm run already finds no room
                report.left_out.append(size)
                continue
            except RuntimeError as error:  # a driver or a kernel that cannot be recorded: the server runs without
                report.error = str(error).strip().split("\n")[0]
                report.left_out.append(size)
                break
            if self._memory() - memory > limits.bytes:
                del replay  # and what it took with it, where nobody shares it
                report.left_out.append(size)
                continue
            self._replays[size] = replay
            report.captured.append(size)
            report.replay_s[size] = self._time(replay)
        if report.error:
            done = set(report.captured)
            report.left_out = [size for size in sizes if size not in done]
        report.seconds, report.bytes = self._clock() - began, self._memory() - memory
        return report

    def _time(self, replay: Replay) -> float:
        replay()
        self._settle()
        began = self._clock()
        replay()
        replay()
        self._settle()
        return (self._clock() - began) / 2


def _call(run: Callable[[Size], None], size: Size) -> Replay:
    return lambda: run(size)


class CudaCapture:
    """Captures calls into graphs that share one pool of memory; they are replayed one after the other, never together.

    A call is made a few times first, on a stream aside: Triton compiles, cuBLAS makes its workspace, and nothing of
    that may happen while a graph is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, call: Replay) -> Replay:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_RUNS):
                call()
        self._stream.synchronize()
        pools = [other.pool() for other in self._graphs]  # of graphs that are kept: all have one
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pools[0] if pools else None, stream=self._stream):
            call()
        self._graphs.add(graph)
        current.wait_stream(self._stream)
        return graph.replay


def graphs_for(run: Callable[[Size], None], device: torch.device) -> Graphs:
    """With CUDA graphs where the device has them."""
    if device.type != "cuda":
        return Graphs(run, None)
    return Graphs(
        run,
        CudaCapture(device),
        memory=lambda: _reserved(device),
        settle=lambda: torch.cuda.synchronize(device),
    )


def _reserved(device: torch.device) -> int:
    """Bytes that somebody needs: what PyTorch keeps for later is given back first."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
