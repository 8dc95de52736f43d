"""What the target says of every window on disk, for runs of many epochs: computed once, read ever after."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.training.settings import SettingsError
from engine.training.sources import UNIT, Draw, Stream

_STATS = 4  # 16-bit numbers that log Z (float32) and the best token (int32) take


class Told(NamedTuple):
    """What the target says of windows [B, T], in the names of `trainable.Batch`."""

    features: Tensor
    hidden: Tensor
    log_z: Tensor | None = None
    best: Tensor | None = None


class FeatureCache:
    """One row of features and final hidden states a window, in bf16, filled as windows are first met.

    Args:
        folder: holds index.json, rows.bin and filled.bin: a window's checksum plus one, 0 while it is not there.
        length: tokens a window; only windows of this length are kept.
        layers, hidden: n feature layers of D values each; a token takes (n + 1)·D.
        stats: whether log Z and the best token are kept, too: four values more.
        key: what the features depend on; another key is refused.
        leads: whether this worker makes the files.
        most: windows that the run can meet, where its budget tells: what the files may come to hold.

    Raises:
        SettingsError: no room, or a cache that belongs to something else or is damaged; names the file.
    """

    def __init__(
        self,
        folder: Path,
        streams: Sequence[Stream],
        length: int,
        layers: int,
        hidden: int,
        key: dict[str, Any],
        leads: bool,
        stats: bool = False,
        most: int | None = None,
    ) -> None:
        self.length, self.depth, self.states = length, layers * hidden, (layers + 1) * hidden
        self.stats, self.width = stats, self.states + (_STATS if stats else 0)
        width = self.width
        self._offsets = np.cumsum([0, *[stream.windows for stream in streams]])
        self.rows = int(self._offsets[-1])
        size = self.rows * (length + 1) * width * 2
        index = folder / "index.json"
        self._path = folder / "rows.bin"
        wanted = {
            **key,
            "format": 2,
            "length": length,
            "width": width,
            "sources": {s.name: len(s.tokens) for s in streams},
        }
        if leads:
            self._make(folder, index, wanted, size, self.rows if most is None else min(most, self.rows))
        _barrier()
        try:
            found = json.loads(index.read_text())
            if found != wanted:
                changed = next(name for name in wanted if found.get(name) != wanted[name])
                raise SettingsError(f"data.cache: {index} has another {changed}; delete {folder} or name another")
            if (folder / "rows.bin").stat().st_size != size or (folder / "filled.bin").stat().st_size != self.rows * 8:
                raise SettingsError(f"data.cache: {folder / 'rows.bin'} has the wrong size; delete {folder}")
        except (OSError, json.JSONDecodeError) as error:
            raise SettingsError(f"data.cache: {index} cannot be read ({error}); delete {folder}") from error
        shape = (self.rows, length + 1, width)
        self._data = np.memmap(folder / "rows.bin", dtype=np.uint16, mode="r+", shape=shape)
        self._filled = np.memmap(folder / "filled.bin", dtype=np.uint64, mode="r+", shape=(self.rows,))

    def _make(self, folder: Path, index: Path, wanted: dict[str, Any], size: int, most: int) -> None:
        room, full = shutil.disk_usage(_existing(folder)).free, most * (self.length + 1) * self.width * 2
        print(
            f"data.cache {folder}: {most:,} windows x {self.length + 1} tokens x {self.width} values x 2 bytes "
            f"= {full / 1e9:.2f} GB at most ({room / 1e9:.1f} GB free)",
            file=sys.stderr,
            flush=True,
        )
        if index.exists():
            return
        if full > room:
            raise SettingsError(
                f"data.cache needs {full / 1e9:.1f} GB, {folder} has {room / 1e9:.1f} GB; leave it out or make room"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, length in (("rows.bin", size), ("filled.bin", self.rows * 8)):
            with (folder / name).open("wb") as file:
                file.truncate(length)  # sparse: takes room only as it fills
        temporary = folder / "index.json.tmp"
        temporary.write_text(json.dumps(wanted) + "\n")
        temporary.replace(index)

    def _rows(self, windows: Sequence[Draw]) -> list[int] | None:
        """Rows of the windows; None when one of them is the shifted last window of its source."""
        if any(window.start % UNIT for window in windows):
            return None
        return [int(self._offsets[w.source]) + w.start // UNIT for w in windows]

    def find(self, windows: Sequence[Draw]) -> Told | None:
        """What the target said, in fp32, when all windows are there.

        Raises:
            SettingsError: a window's bytes are not those that were written; names the file.
        """
        rows = self._rows(windows)
        if rows is None or not bool(self._filled[rows].all()):
            return None
        stored = self._data[rows]
        for row, values in zip(rows, stored, strict=True):
            if int(self._filled[row]) != _checksum(values):
                raise SettingsError(f"data.cache: {self._path} is damaged at window {row}; delete {self._path.parent}")
        return self._split(torch.from_numpy(stored.view(np.int16)))

    def keep(self, windows: Sequence[Draw], told: Told) -> Told:
        """Store what the target said, and return it as `find` will; a window counts once its bytes are written."""
        states = torch.cat((told.features, told.hidden), -1).to(torch.bfloat16).cpu()
        values = states.view(torch.int16)
        if self.stats:
            assert told.log_z is not None and told.best is not None
            numbers = (told.log_z.cpu().view(torch.int32), told.best.to(torch.int32).cpu())
            values = torch.cat((values, torch.stack(numbers, -1).view(torch.int16)), -1)
        rows = self._rows(windows)
        if rows is not None:
            stored = values.numpy().view(np.uint16)
            self._data[rows] = stored
            self._data.flush()
            self._filled[rows] = [_checksum(one) for one in stored]
        return self._split(values)

    def _split(self, values: Tensor) -> Told:
        states = values[..., : self.states].contiguous().view(torch.bfloat16).float()
        told = Told(states[..., : self.depth], states[..., self.depth :])
        if not self.stats:
            return told
        numbers = values[..., self.states :].contiguous().view(torch.int32)
        log_z = numbers[..., 0].contiguous().view(torch.float32)
        return told._replace(log_z=log_z, best=numbers[..., 1].long())


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(values.tobytes()) + 1


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.absolute().parent
    return folder


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
