"""An environment for each peer, below build/peers: made once from pinned versions, and a reason where it cannot be."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import ROOT, say

BUILD = ROOT / "build" / "peers"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with exactly what a requirements file says.

    Args:
        disk: what it takes once installed, for people.
    """

    name: str
    requirements: Path
    disk: str
    folder: Path = BUILD

    @property
    def place(self) -> Path:
        return self.folder / self.name

    @property
    def python(self) -> Path:
        return self.place / "bin" / "python"

    @property
    def missing(self) -> str | None:
        """Why it cannot be used, or None."""
        if self._read("installed") == self._digest():
            return None
        if (reason := self._read("failed")) is not None:
            return f"not installed: {reason}"
        return "not installed: `python -m tests.bench.peers install` does that"

    def install(self) -> str | None:
        """Makes it where it is not there yet, or not from today's requirements; why not, or None."""
        if self.missing is None:
            return None
        shown = self.requirements.relative_to(ROOT) if self.requirements.is_relative_to(ROOT) else self.requirements
        say(f"{self.name}: installing {shown} into {self.place} ({self.disk})")
        began = time.perf_counter()
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.parent.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--without-pip", str(self.place)],
            # The files are complete; what vLLM asks for besides would end its start (requirements/peers-vllm.txt).
            [*pip, "install", "--quiet", "--no-deps", "-r", str(self.requirements)],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                self.place.mkdir(exist_ok=True)
                reason = _cause(done.stdout)
                (self.place / "failed").write_text(reason, encoding="utf-8")
                say(f"{self.name}: cannot be installed: {reason}")
                return reason
        (self.place / "installed").write_text(self._digest(), encoding="utf-8")
        say(f"{self.name}: installed in {time.perf_counter() - began:.0f} s")
        return None

    def _digest(self) -> str:
        return hashlib.sha256(self.requirements.read_bytes()).hexdigest()

    def _read(self, name: str) -> str | None:
        try:
            return (self.place / name).read_text(encoding="utf-8")
        except OSError:
            return None


def _cause(output: str) -> str:
    """The line of a package client's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1][:400]


REQUIREMENTS = ROOT / "requirements"
ENVIRONMENTS = {
    "transformers": Environment("transformers", REQUIREMENTS / "peers-transformers.txt", "1.2 GB"),
    "vllm": Environment("vllm", REQUIREMENTS / "peers-vllm.txt", "3.5 GB"),
    "llama": Environment("llama", REQUIREMENTS / "peers-llama.txt", "0.4 GB"),
}
