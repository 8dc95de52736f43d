"""How a server starts, fails to start, and ends."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients.client import Client, ServerError
from clients.events import Finished, Options
from clients.retry import NEVER
from tests.e2e.conftest import ROOT, Process, engine_of, start


def refused(*arguments: str) -> str:
    """What a server that cannot start says."""
    done = subprocess.run(
        [sys.executable, "-m", "server", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


def test_a_port_in_use(server: Process) -> None:
    assert "choose another port" in refused("--listen", server.address)


def test_nothing_to_serve(tmp_path: Path) -> None:
    assert str(tmp_path) in refused("--model", str(tmp_path), "--listen", "127.0.0.1:0")


def test_weights_that_do_not_load(tmp_path: Path) -> None:
    """What only the engine's process finds out comes out of the server's all the same."""
    shutil.copytree(ROOT / "engine" / "demo" / "target", tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refused("--model", str(tmp_path), "--listen", "127.0.0.1:0")


@pytest.mark.parametrize("line", ["--kv-memory much", "--draft medusa", "--draft no/such/drafter-at-all --model ."])
def test_wrong_flags(line: str) -> None:
    assert refused("--listen", "127.0.0.1:0", *line.split())


async def test_sigterm_lets_running_requests_finish(tmp_path: Path) -> None:
    process = await asyncio.to_thread(start, ["--draft", "none"], tmp_path / "log")
    async with Client(process.address, retry=NEVER) as client:
        events = client.generate("import os\n", Options(max_tokens=300, ignore_eos=True))
        await anext(events)
        engine = engine_of(process)
        engine.terminate()  # an init system may signal everybody; the engine leaves it to the server
        stopping = asyncio.ensure_future(asyncio.to_thread(process.stop))
        await asyncio.sleep(0.1)
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            await client.complete("late")
        last = [event async for event in events][-1]
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 300
    assert await stopping == 0
    assert not engine.is_running()
    assert "Traceback" not in process.log_path.read_text()
