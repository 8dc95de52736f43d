"""What a run writes about itself: log.jsonl, and TensorBoard event files where that is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engine.training.trainable import Metrics


def means(metrics: Metrics) -> dict[str, Any]:
    """Weighted means, vectors as lists, rounded for reading."""
    out: dict[str, Any] = {}
    for name, (total, weight) in metrics.items():
        value = (total / weight.clamp_min(1e-9)).tolist()
        out[name] = [round(v, 6) for v in value] if isinstance(value, list) else round(value, 6)
    return out


class Journal:
    """Running means since the last line; lines past `step` of an earlier, killed run are dropped.

    Args:
        writes: whether this worker is the one that writes.
    """

    def __init__(self, folder: Path, step: int, writes: bool) -> None:
        self.path = folder / "log.jsonl"
        self._sums: Metrics = {}
        self._shown: dict[str, float] = {}
        self._events: Any = None
        if writes:
            self._forget(step)
            self._events = _events(folder / "tensorboard", step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()

    def _forget(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line cut off by a kill
        self.path.write_text("".join(kept), encoding="utf-8")

    def add(self, metrics: Metrics) -> None:
        """Take in one step."""
        for name, (total, weight) in metrics.items():
            before = self._sums.get(name)
            self._sums[name] = (total, weight) if before is None else (before[0] + total, before[1] + weight)
            if total.dim() == 0:
                fresh = float(total) / max(float(weight), 1e-9)
                self._shown[name] = 0.95 * self._shown.get(name, fresh) + 0.05 * fresh

    def mean(self, name: str) -> float:
        """A smoothed metric, for progress lines."""
        return self._shown.get(name, float("nan"))

    def write(self, step: int, used: float, **more: float) -> None:
        """One line of means since the last, and start anew."""
        row = {**means(self._sums), **{name: round(value, 4) for name, value in more.items()}}
        self._append({"step": step, "minutes": round(used / 60, 3), **row})
        self._sums = {}
        if self._events is not None:
            for name, value in row.items():
                values = value if isinstance(value, list) else [value]
                for index, one in enumerate(values):
                    tag = f"train/{name}" if len(values) == 1 else f"train/{name}/{index + 1}"
                    self._events.add_scalar(tag, one, step)

    def heldout(self, step: int, used: float, found: dict[str, dict[str, Any]]) -> None:
        """Held-out metrics by domain."""
        if not found:
            return
        self._append({"step": step, "minutes": round(used / 60, 3), "heldout": found})
        if self._events is not None:
            for domain, metrics in found.items():
                for name, value in metrics.items():
                    if not isinstance(value, list):
                        self._events.add_scalar(f"heldout/{domain}/{name}", value, step)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            f"no TensorBoard logs (log.jsonl has the same): pip install -r requirements/train.txt, then "
            f"tensorboard --logdir {folder.parent}",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(str(folder), purge_step=step)
