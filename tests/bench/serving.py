"""The service: what gRPC adds to the engine, 64 streams at once, start-up time and memory."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from clients.client import Client
from clients.events import Delta, Options
from engine.types import EndConditions, Request, Sampling
from tests.bench.decoding import make_engine
from tests.bench.measure import EMBEDDED, ROOT, emit, median, say, seconds


@contextmanager
def server(threads: int, *arguments: str, **environment: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """A real server on the embedded model: address, its front process, seconds until ready."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--threads", str(threads), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        yield line.rsplit(" ", 1)[1].strip(), psutil.Process(process.pid), time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(30)


def serving(threads: int, repeats: int) -> None:
    prompt = EMBEDDED.heldout("code")[0]
    tokens = 256
    ids = EMBEDDED.encode([prompt])[0]
    engine = make_engine("auto", threads)

    def alone() -> float:
        def work() -> None:
            engine.submit(Request("alone", tuple(ids), EndConditions(tokens), Sampling(temperature=0.0)))
            while engine.has_work:
                engine.step()

        return tokens / seconds(work)

    with server(threads) as (address, process, ready):
        say("gRPC streaming beside the engine alone")

        async def stream(client: Client, limit: int) -> int:
            options = Options(max_tokens=limit, temperature=0.0, ignore_eos=True)
            count = 0
            async for event in client.generate(prompt, options):
                if isinstance(event, Delta):
                    count += len(event.token_ids)
            return count

        async def measure() -> None:
            async with Client(address) as client:
                loop = asyncio.get_running_loop()
                await stream(client, tokens)
                alone()
                pairs: dict[str, list[float]] = {"engine": [], "grpc": []}
                for repeat in range(3 * repeats):
                    for arm in ("engine", "grpc") if repeat % 2 else ("grpc", "engine"):
                        if arm == "engine":
                            pairs[arm].append(await loop.run_in_executor(None, alone))
                        else:
                            start = time.perf_counter()
                            count = await stream(client, tokens)
                            pairs[arm].append(count / (time.perf_counter() - start))
                emit(
                    name="server_overhead",
                    threads=threads,
                    engine_tokens_per_s=median(pairs["engine"]),
                    grpc_tokens_per_s=median(pairs["grpc"]),
                    ratio=median(pairs["grpc"]) / median(pairs["engine"]),
                )
                say("64 concurrent streams")
                start = time.perf_counter()
                counts = await asyncio.gather(*(stream(client, 64) for _ in range(64)), return_exceptions=True)
                took = time.perf_counter() - start
                errors = [c for c in counts if isinstance(c, BaseException)]
                emit(
                    name="concurrent_streams",
                    streams=64,
                    errors=len(errors),
                    short=sum(1 for c in counts if c != 64) - len(errors),
                    tokens_per_s=sum(c for c in counts if isinstance(c, int)) / took,
                )

        asyncio.run(measure())
        resident = sum(each.memory_info().rss for each in (process, *process.children())) / 2**20
        emit(name="startup", ready_s=ready, resident_mb=resident, threads=threads)
