"""A real server process on the embedded model, one for all tests here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
START_S = 240.0  # generous: the first start on a machine compiles kernels


@dataclass
class Process:
    """A started server."""

    popen: subprocess.Popen[str]
    address: str
    ready_line: str
    log_path: Path

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(60)


def start(arguments: Sequence[str], log_path: Path, **environment: str) -> Process:
    """Starts `python -m server` and waits for its ready line. `environment`: variables on top of ours."""
    with log_path.open("w") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert popen.stdout is not None
    line = popen.stdout.readline()
    if not line.startswith("serving "):
        popen.kill()
        popen.wait()
        raise AssertionError(log_path.read_text()[-2000:])
    return Process(popen, line.rsplit(" ", 1)[-1].strip(), line, log_path)


def engine_of(process: Process | subprocess.Popen[str]) -> psutil.Process:
    """The server's engine, once it has been started."""
    popen = process.popen if isinstance(process, Process) else process
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(popen.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "server.engine_process" in child.cmdline():
                    return child
        time.sleep(0.01)
    raise AssertionError("the server has no engine")


def client(address: str, *arguments: str, code: int = 0, text: str | None = None) -> str:
    """Runs `python -m clients`; returns what it printed."""
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "clients", arguments[0], "--server", address, *arguments[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        input=text,
        timeout=120,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def generate(address: str, prompt: str, *flags: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(client(address, "generate", "--prompt", prompt, "--json", *flags))
    return answer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = start(["--max-running", "16"], tmp_path_factory.mktemp("server") / "log")
    yield process
    if process.popen.poll() is None:
        assert process.stop() == 0
