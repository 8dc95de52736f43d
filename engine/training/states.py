"""Checkpoints of a run: written whole or not at all, checked when read, never silently replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch


class StateError(RuntimeError):
    """A checkpoint that cannot be used; names the file and the mend."""


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class States:
    """Folders `step-…` under a run's folder, the newest `keep` of them.

    A folder is filled under another name and renamed when its bytes are on disk: a kill leaves either
    all of it or nothing.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*[0-9]"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then drop the oldest ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary, final = self.folder / "writing", self.folder / f"step-{step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        manifest = {"step": step, "sha256": digest(temporary / "state.pt")}
        (temporary / "manifest.json").write_text(json.dumps(manifest) + "\n")
        self._drop(final)
        temporary.rename(final)
        for old in self.all()[: -self.keep]:
            self._drop(old)
        return final

    def _drop(self, folder: Path) -> None:
        """Delete a checkpoint; half of one must never carry a checkpoint's name."""
        aside = self.folder / "dropping"
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.rename(aside)
            shutil.rmtree(aside)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint, None when there is none.

        Raises:
            StateError: it is truncated or was changed.
        """
        found = self.all()
        if not found:
            return None
        path = found[-1] / "state.pt"
        try:
            expected = json.loads((found[-1] / "manifest.json").read_text())["sha256"]
            if digest(path) != expected:
                raise ValueError("its bytes are not those that were written")
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # any damage means the same to the reader
            rest = f"to go on from {found[-2].name}" if len(found) > 1 else "to start over"
            raise StateError(f"{path} cannot be resumed ({error}); delete {found[-1]} {rest}") from error
        return state
