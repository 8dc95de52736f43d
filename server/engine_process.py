"""The engine's process, seen from both ends: the server starts it here, and `python -m server.engine_process FD` is it.

It is a fresh interpreter and no fork: threads and gRPC do not survive one. PyTorch is loaded there only.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import LoadError
from server import logs
from server.boundary import NotLoaded, Ready, Start, pack
from server.collector import pass_over_what_stays
from server.engine_loop import EngineLoop, Pipe
from server.logs import log

ROOT = Path(__file__).resolve().parent.parent
READY_S = 6.0  # so that a server is ready within 10 s of its start; measuring costs gets what loading leaves
# The table is kept: what a first start, which compiles for a minute, took no time for would never be measured.
LEAST_MEASURING_S = 4.0
_PR_SET_PDEATHSIG = 1
_STDERR = 2


class EngineProcess:
    """A started engine; `connection` is the server's end, and reads as closed once the process is gone."""

    def __init__(self, config: EngineConfig, log_level: str) -> None:
        self.connection, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,  # Ctrl-C is for the server alone, which decides when the engine ends
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,  # stdout is for the line that the server prints when ready
            )
        self.connection.sendall(pack(Start(config, log_level)))
        self.name = f"process {self._popen.pid}"

    def kill(self) -> None:
        """Ends it, whatever it is doing."""
        self._popen.kill()

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        code = self._popen.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def main(descriptor: int) -> int:
    """Loads what the server asks for and runs it until the server hangs up."""
    _die_with_the_server()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an init system may send it to everybody; the server drains first
    pipe = Pipe(socket.socket(fileno=descriptor))
    (start,) = pipe.receive(wait=True)
    logs.configure(start.log_level)
    try:
        return _serve(start, pipe)
    except (EOFError, ConnectionError):
        return 0
    except Exception as error:
        log("engine_crashed", level=logging.ERROR, exc_info=error)
        return 1


def _serve(start: Start, pipe: Pipe) -> int:
    started = time.monotonic()
    from engine.loading import learn_costs, load_engine, warm_up  # loads PyTorch, which only this process may

    try:
        began = time.monotonic()
        engine = load_engine(start.config)
        loaded = time.monotonic()
        warm_up(engine)
        warm = time.monotonic()
        source = learn_costs(engine, max(READY_S - (warm - started), LEAST_MEASURING_S))
    except LoadError as error:
        pipe.send(NotLoaded(str(error)))
        return 0
    log("warm", load_s=round(loaded - began, 3), warm_s=round(warm - loaded, 3))
    if engine.device_rounds is not None:
        log("graphs", **engine.device_rounds.report.as_dict())
    log("costs", source=source, seconds=round(time.monotonic() - warm, 3))
    pass_over_what_stays()
    pipe.send(Ready(engine.info, engine.config))
    return 0 if EngineLoop(engine, pipe).run() else 1


def _die_with_the_server() -> None:
    """The kernel's help (Linux) for the case that the engine is deep in a round and reads nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
