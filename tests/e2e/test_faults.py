"""The engine's process killed, stopped, orphaned: what a client sees, and what comes back by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.service import SERVICE_NAME
from tests.e2e.conftest import ROOT, Process, engine_of, start

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HANG_S = 2.0
ENDLESS = wire.GenerateRequest(text="import", max_tokens=3500, ignore_eos=True)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = start(["--hang-seconds", str(HANG_S)], tmp_path_factory.mktemp("fragile") / "log")
    yield process
    assert process.stop() == 0


@pytest.fixture
async def channel(fragile: Process) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(fragile.address) as channel:
        yield channel


async def greedy(channel: grpc.aio.Channel, tokens: int = 24) -> str:
    request = wire.GenerateRequest(text="def add(", max_tokens=tokens, ignore_eos=True)
    request.sampling.temperature = 0.0
    return "".join([m.delta.text async for m in wire_grpc.GenerationServiceStub(channel).Generate(request)])


@pytest.mark.parametrize(
    ("hurt", "within_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 2 * HANG_S)], ids=["crash", "hang"]
)
async def test_a_lost_engine_ends_every_stream_and_comes_back(
    fragile: Process, channel: grpc.aio.Channel, hurt: signal.Signals, within_s: float
) -> None:
    before = await greedy(channel)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await watch.read()).status == SERVING
    stub = wire_grpc.GenerationServiceStub(channel)
    calls = [stub.Generate(ENDLESS).__aiter__() for _ in range(4)]
    for call in calls:
        assert (await anext(call)).WhichOneof("event") == "started"
    engine = engine_of(fragile)
    engine.send_signal(hurt)
    began = time.monotonic()

    async def end(call: AsyncIterator[wire.GenerateResponse]) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in call:
                pass
        return error.value.code()

    assert set(await asyncio.gather(*map(end, calls))) == {grpc.StatusCode.UNAVAILABLE}
    assert time.monotonic() - began < within_s
    assert (await watch.read()).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await greedy(channel)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "restarted" in str(error.value.details())
    async with asyncio.timeout(60):
        assert (await watch.read()).status == SERVING
    assert await greedy(channel) == before
    assert engine_of(fragile).pid != engine.pid
    watch.cancel()


def test_the_front_process_does_without_pytorch(fragile: Process) -> None:
    maps = Path(f"/proc/{fragile.popen.pid}/maps").read_text()
    assert "libpython" in maps or "uvloop" in maps
    assert "torch" not in maps
    assert "torch" in Path(f"/proc/{engine_of(fragile).pid}/maps").read_text()


@pytest.fixture
def loading() -> Iterator[subprocess.Popen[str]]:
    """A server that has just started its engine's process, and is ended whatever happens."""
    popen = subprocess.Popen(
        [sys.executable, "-m", "server", "--listen", "127.0.0.1:0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    engine_of(popen)
    yield popen
    popen.kill()
    popen.communicate()


def test_an_engine_that_reads_nothing_does_not_outlive_its_server(loading: subprocess.Popen[str]) -> None:
    engine = engine_of(loading)
    while not any("torch" in mapping.path for mapping in engine.memory_maps()):  # deep in an import
        time.sleep(0.01)
    loading.kill()
    engine.wait(10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_both_quietly(loading: subprocess.Popen[str], number: signal.Signals) -> None:
    engine = engine_of(loading)
    os.killpg(loading.pid, number)
    out, errors = loading.communicate(timeout=60)
    assert (loading.returncode, out) == (0, ""), errors
    assert "Traceback" not in errors
    engine.wait(10)
