"""A real collector: the agent that the `rotel` package brings, as a process."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rotel

AGENT = Path(rotel.__file__).parent / "rotel-agent"


@contextmanager
def rotel_agent(folder: Path, *exporter: str) -> Iterator[str]:
    """Gives the address at which it takes OTLP. `exporter`: flags that say where it all goes."""
    grpc_port, http_port = _free_ports(2)
    command = [
        *(str(AGENT), "start", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}"),
        *("--otlp-http-endpoint", f"127.0.0.1:{http_port}", "--batch-timeout", "50ms"),
        *("--pid-file", str(folder / "rotel.pid"), "--log-file", str(folder / "rotel.log"), *exporter),
    ]
    with (folder / "rotel.out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait(grpc_port, process)
        yield f"http://127.0.0.1:{grpc_port}"
    finally:
        process.terminate()
        process.wait(60)


def _free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(2400):
        assert process.poll() is None, "the collector has ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("the collector does not listen")
