"""The engine killed under load, and the server told to stop: what running streams and later requests see."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import grpc
import psutil
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

PROMPT = "import os\n"
LATE = 1.25  # a return may take so many cold starts: a machine is never as busy twice


async def kills(
    address: str, engine: Callable[[], psutil.Process], count: int, cold_start_s: float, streams: int = 16
) -> dict[str, Any]:
    """Kills the engine `count` times under load; how long streams took to end and the server to come back.

    Each engine first lives as long as a start takes: one that lives shorter is started again after a pause that grows.
    """
    ended_s: list[float] = []
    back_s: list[float] = []
    wrong: list[str] = []
    endless = wire.GenerateRequest(text=PROMPT, max_tokens=3000, ignore_eos=True)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = wire_grpc.GenerationServiceStub(channel)
        before = await _tokens(stub)
        for number in range(count):
            await asyncio.sleep(cold_start_s)
            calls = [stub.Generate(endless) for _ in range(streams)]
            for call in calls:
                await call.read()
            process = engine()
            process.kill()
            began = time.monotonic()
            codes = await asyncio.gather(*(_end(call) for call in calls))
            ended_s.append(time.monotonic() - began)
            if set(codes) != {"UNAVAILABLE"}:
                wrong.append(f"kill {number}: streams ended with {Counter(codes)}")
            while True:
                try:
                    after = await _tokens(stub)
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() - began > 120:
                        wrong.append(f"kill {number}: afterwards {error.code().name}")
                        after = before
                        break
                    await asyncio.sleep(0.05)
            back_s.append(time.monotonic() - began)
            if after != before:
                wrong.append(f"kill {number}: another text afterwards")
    return {
        "kills": count,
        "cold_start_s": round(cold_start_s, 2),
        "streams_each": streams,
        "slowest_end_s": round(max(ended_s), 3),
        "median_return_s": round(median(back_s), 2),
        "slowest_return_s": round(max(back_s), 2),
        "wrong": wrong,
        "ok": not wrong and max(ended_s) < 1.0 and median(back_s) <= LATE * cold_start_s,
    }


async def _tokens(stub: Any) -> list[int]:
    request = wire.GenerateRequest(text=PROMPT, max_tokens=24, ignore_eos=True)
    request.sampling.temperature = 0.0
    return [token async for message in stub.Generate(request) for token in message.delta.token_ids]


async def _end(call: Any) -> str:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
    return str((await call.code()).name)


async def drain(address: str, terminate: Callable[[], None], streams: int = 64) -> dict[str, Any]:
    """SIGTERM under load: all running streams finish, and new ones are told when to come back."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = wire_grpc.GenerationServiceStub(channel)
        request = wire.GenerateRequest(text=PROMPT, max_tokens=200, ignore_eos=True)
        calls = [stub.Generate(request) for _ in range(streams)]
        for call in calls:
            await call.read()
        running = [asyncio.ensure_future(_count(call)) for call in calls]
        terminate()
        await asyncio.sleep(0.2)
        late = stub.Generate(request)
        code = await _end(late)
        pushback = dict(await late.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
        counts = await asyncio.gather(*running)
    lost = sum(count != 200 for count in counts)
    ok = lost == 0 and code == "UNAVAILABLE" and (pushback is not None)
    return {"streams": streams, "lost": lost, "late": code, "pushback_ms": pushback, "ok": ok}


async def _count(call: Any) -> int:
    count = 0
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            count += len(message.delta.token_ids)
    except grpc.aio.AioRpcError:
        return -1
    return count if await call.code() is grpc.StatusCode.OK else -1
