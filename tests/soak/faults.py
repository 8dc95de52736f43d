"""The engine killed under load, and the server told to stop: what running streams and later requests see."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import grpc
import psutil
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.soak.run import Known, decode

PROMPT = "import os\n"
SERVICE = "dspark.v1.GenerationService"
END_S = 1.0  # within which every running stream must have ended
# A return is a cold start but for the front process: the two are equal but for how busy the machine is.
USUAL, LATE = 1.1, 1.5  # the median return, and the slowest, may take so many cold starts
CHECKED = 8  # known texts that are decoded again after each kill
LIMIT_S = 300.0


async def kills(
    address: str,
    engine: Callable[[], psutil.Process],
    count: int,
    cold_start_s: float,
    texts: Sequence[Known],
    streams: int = 16,
) -> dict[str, Any]:
    """Kills the engine `count` times under load; how long streams took to end and the server to be ready again.

    Each engine first lives twice as long as a start takes: one that dies within a start comes back after a pause that
    grows with each.
    """
    ended_s: list[float] = []
    back_s: list[float] = []
    wrong: list[str] = []
    endless = wire.GenerateRequest(text=PROMPT, max_tokens=3000, ignore_eos=True)
    async with grpc.aio.insecure_channel(address) as channel:
        stub, health = wire_grpc.GenerationServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        for number in range(count):
            await asyncio.sleep(2 * cold_start_s)
            calls = [stub.Generate(endless) for _ in range(streams)]
            for call in calls:
                await call.read()
            process = engine()
            process.kill()
            began = time.monotonic()
            codes = await asyncio.gather(*(_end(call) for call in calls))
            ended_s.append(time.monotonic() - began)
            if set(codes) != {"UNAVAILABLE"}:
                wrong.append(f"kill {number}: streams ended with {dict(Counter(codes))}")
            code, pushback = await _refusal(stub.Generate(endless))
            if code != "UNAVAILABLE" or pushback is None:
                wrong.append(f"kill {number}: a request without an engine ended with {code}, pushback {pushback}")
            while not await _serving(health):
                if time.monotonic() - began > LIMIT_S:
                    raise RuntimeError(f"kill {number}: no engine after {LIMIT_S:g} s")
                await asyncio.sleep(0.02)
            back_s.append(time.monotonic() - began)
            wrong += [f"kill {number}: {each}" for each in await _compare(stub, texts, number)]
    ok = not wrong and max(ended_s) < END_S and median(back_s) <= USUAL * cold_start_s
    ok = ok and max(back_s) <= LATE * cold_start_s
    return {
        "kills": count,
        "cold_start_s": round(cold_start_s, 2),
        "streams_each": streams,
        "slowest_end_s": round(max(ended_s), 3),
        "median_return_s": round(median(back_s), 2),
        "slowest_return_s": round(max(back_s), 2),
        "texts_compared": count * CHECKED,
        "wrong": wrong,
        "ok": ok,
    }


async def _serving(health: Any) -> bool:
    answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _compare(stub: Any, texts: Sequence[Known], number: int) -> list[str]:
    """Some of the known texts, all at once, now that there is an engine; what is wrong with them."""
    chosen = [(number * CHECKED + i) % len(texts) for i in range(CHECKED)]
    answers = await asyncio.gather(*(decode(stub, index) for index in chosen), return_exceptions=True)
    return [
        f"text {index} afterwards: {answer if isinstance(answer, BaseException) else 'another one'}"
        for index, answer in zip(chosen, answers, strict=True)
        if answer != texts[index]
    ]


async def _refusal(call: Any) -> tuple[str, str | None]:
    """A call's code, and the server's wish when to come back, in milliseconds."""
    code = await _end(call)
    return code, dict(await call.trailing_metadata() or ()).get("grpc-retry-pushback-ms")


async def _end(call: Any) -> str:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
    return str((await call.code()).name)


async def drain(address: str, terminate: Callable[[], None], streams: int = 64) -> dict[str, Any]:
    """SIGTERM under load: readiness goes off, all running streams finish, and new ones are told when to come back."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub, health = wire_grpc.GenerationServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        request = wire.GenerateRequest(text=PROMPT, max_tokens=200, ignore_eos=True)
        calls = [stub.Generate(request) for _ in range(streams)]
        for call in calls:
            await call.read()
        running = [asyncio.ensure_future(_count(call)) for call in calls]
        terminate()
        began = time.monotonic()
        while await _serving(health) and time.monotonic() - began < LIMIT_S:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.01)
        unready_s, unfinished = time.monotonic() - began, sum(not each.done() for each in running)
        code, pushback = await _refusal(stub.Generate(request))
        counts = await asyncio.gather(*running)
    lost = sum(count != 200 for count in counts)
    return {
        "streams": streams,
        "still_running": unfinished,
        "lost": lost,
        "unready_s": round(unready_s, 3),
        "late": code,
        "pushback_ms": pushback,
        "ok": lost == 0 and unfinished > 0 and code == "UNAVAILABLE" and pushback is not None,
    }


async def _count(call: Any) -> int:
    count = 0
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            count += len(message.delta.token_ids)
    except grpc.aio.AioRpcError:
        return -1
    return count if await call.code() is grpc.StatusCode.OK else -1
