"""The arms of `make bench-load`: what each server is told, started once and asleep while the others run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.measure import ROOT, Subject, say

STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to decode: the drafter and the policy that a server is started with."""

    name: str
    draft: str
    policy: tuple[str, ...]
    usual: bool = True  # otherwise only by its name

    def place(self, subject: Subject) -> str | None:
        """The server's --draft; None where there is no such drafter."""
        if self.draft == "none":
            return self.draft
        found = subject.drafter(self.draft)
        return None if found is None else str(found)


# Drafters without a confidence head have nothing to adapt by: their whole block is verified, as in their papers.
ARMS = (
    Arm("plain", "none", ("plain",)),
    Arm("mtp1", "mtp", ("fixed", "--draft-tokens", "1")),
    Arm("dflash", "dflash", ("fixed",)),
    Arm("eagle3", "eagle3", ("fixed",)),
    Arm("dspark-fixed-3", "dspark", ("fixed", "--draft-tokens", "3")),
    Arm("dspark-fixed-7", "dspark", ("fixed", "--draft-tokens", "7")),
    Arm("dspark-threshold", "dspark", ("threshold",)),
    Arm("dspark-auto", "dspark", ("auto",)),
    Arm("dspark-auto-alone", "dspark", ("auto", "--lookup", "never"), usual=False),
)


def choose(names: list[str], subject: Subject) -> list[Arm]:
    """The arms of these names (all without any) whose drafter is there; says which are left out."""
    chosen = []
    for arm in ARMS:
        if arm.name not in names if names else not arm.usual:
            continue
        if arm.place(subject) is not None:
            chosen.append(arm)
        else:
            say(f"skipping {arm.name}: {subject.drafters / arm.draft} is no drafter")
    return chosen


class Server:
    """A real server for one arm, asleep (SIGSTOP) but for when it is wanted.

    Args:
        costs: folder for measured cost tables; arms of one drafter share it.
    """

    def __init__(self, arm: Arm, subject: Subject, threads: int | None, costs: Path) -> None:
        self.arm = arm
        start = time.perf_counter()
        self._log = (costs.parent / f"{arm.name}.log").open("w", encoding="utf-8")
        flags = [
            "--model",
            str(subject.target),
            "--draft",
            arm.place(subject) or "none",
            "--policy",
            *arm.policy,
            "--cost-cache",
            str(costs / arm.draft),
        ]
        if threads is not None:
            flags += ["--threads", str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--log-level", "warning", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("serving "):
            self.stop()
            raise RuntimeError(f"{arm.name} did not start; {self._log.name} has the cause")
        self.address = line.rsplit(" ", 1)[1].strip()
        front = psutil.Process(self._process.pid)
        self._front, self._engine = front, front.children()[0]
        say(f"{arm.name} ready on {self.address} after {time.perf_counter() - start:.1f} s")
        self._sleep()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While it is; a round that falls asleep goes on in the next turn.

        Raises:
            RuntimeError: one of its processes is gone.
        """
        try:
            for process in (self._front, self._engine):
                process.resume()
            yield
        finally:
            self._sleep()

    def _sleep(self) -> None:
        try:
            for process in (self._engine, self._front):
                process.suspend()
        except psutil.NoSuchProcess as error:
            raise RuntimeError(f"{self.arm.name} has lost a process; {self._log.name} has the cause") from error

    def cpu_s(self) -> tuple[float, float]:
        """Processor seconds so far, of the front process and of the engine's."""
        return _busy(self._front), _busy(self._engine)

    def stop(self) -> None:
        """Ends it, asleep or not."""
        self._process.terminate()
        with suppress(psutil.NoSuchProcess):
            front = psutil.Process(self._process.pid)
            for process in (front, *front.children()):
                process.resume()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _busy(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
