"""What a long command shows while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

WINDOW_S = 60.0  # the rate is that of about this long


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as short as can be."""
    whole = int(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Counts work done; shows share, rate and remaining time on stderr.

    Args:
        total: units of work, None when nobody knows.
        unit: what is counted, for the rate.
        begun: units that an earlier run did.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, title: str, total: float | None, unit: str, begun: float = 0.0, every: float = 10.0) -> None:
        self.title, self.total, self.unit, self.every = title, total, unit, every
        self.done: float = begun
        self.begun = begun
        self.note = ""
        self._shown = time.perf_counter()
        self._marks: deque[tuple[float, float]] = deque([(self._shown, begun)])
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = self._make_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        elif kind is None:
            print(self.line(), file=sys.stderr, flush=True)

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        bar = Bar(
            TextColumn("{task.description}", table_column=Column(min_width=len(self.title), no_wrap=True)),
            BarColumn(bar_width=10, table_column=Column(min_width=10)),  # words need the rest of 80 columns
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=Console(stderr=True),
        )
        task = bar.add_task(self.title, total=self.total, completed=int(self.done), text="")
        bar.start()
        return bar, task

    def line(self) -> str:
        """`title 40/100 steps · 3.1 steps/s · 0:19 left · note`."""
        (since, first), (now, done) = self._marks[0], self._marks[-1]
        rate = (done - first) / (now - since) if now > since else 0.0
        of = f"/{self.total:,.0f}" if self.total is not None else ""
        parts = [
            f"{self.done:,.0f}{of} {self.unit}",
            f"{rate:,.2f} {self.unit}/s" if rate < 10 else f"{rate:,.0f} {self.unit}/s",
        ]
        if self.total is not None and rate > 0:
            parts.append(f"{clock((self.total - self.done) / rate)} left")
        return f"{self.title} " + " · ".join([*parts, *([self.note] if self.note else [])])

    def update(self, done: float, note: str = "") -> None:
        """Say how far the work is (absolute)."""
        self.done, self.note = done, note
        marks, now = self._marks, time.perf_counter()
        marks.append((now, done))
        # The first step compiles, and says nothing about the others.
        while len(marks) > 2 and (now - marks[1][0] >= WINDOW_S or marks[0][1] == self.begun):
            marks.popleft()
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=done, text=self.line().removeprefix(f"{self.title} "))
        elif time.perf_counter() - self._shown >= self.every:
            self._shown = time.perf_counter()
            print(self.line(), file=sys.stderr, flush=True)
