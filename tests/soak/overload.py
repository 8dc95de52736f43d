"""Ten times more requests than a server can take: what is admitted stays quick, the rest hears so at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

RUNNING, QUEUE = 16, 8
# A queue makes the admitted wait for QUEUE / RUNNING of a request, on top of their own time.
FLAGS = ("--max-running", str(RUNNING), "--max-queue", str(QUEUE), "--log-level", "info")
FACTOR = 10
TURNS = 4
MAX_RATIO, MAX_REFUSAL_S = 2.0, 0.25
_TOKENS = 48
_LOG_S = 0.5  # a call's line in the log comes after its answer


@dataclass
class Phase:
    """Stretches of load at one multiple of capacity, as their clients saw them."""

    rates: list[float] = field(default_factory=list)  # requests a second
    admitted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    # The same calls by the server's own clock: under ten times the load, the clients on the same cores are late, too.
    server_admitted_s: list[float] = field(default_factory=list)
    server_refused_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "requests_per_s": [round(rate, 1) for rate in self.rates],
            "admitted": len(self.admitted_s),
            "admitted_p50_s": round(percentile(self.admitted_s, 0.5), 3),
            "admitted_p99_s": round(percentile(self.admitted_s, 0.99), 3),
            "refused": len(self.refused_s),
            "refused_p99_s": round(percentile(self.refused_s, 0.99), 4),
            "server_side_admitted_p50_s": round(percentile(self.server_admitted_s, 0.5), 3),
            "server_side_admitted_p99_s": round(percentile(self.server_admitted_s, 0.99), 3),
            "server_side_refused_p99_s": round(percentile(self.server_refused_s, 0.99), 4),
        }


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


async def overload(address: str, log: Path, seconds: float, seed: int = 1, turns: int = TURNS) -> dict[str, Any]:
    """Measures a server started with FLAGS that writes to `log`: its capacity, then at it, then at FACTOR times that.

    In turns, so that a machine that is slower for a while is so for both; each load lasts `seconds` in all. Capacity
    is the rate of completions while RUNNING requests are always there; arrivals are a Poisson process.
    """
    at_capacity, above = Phase(), Phase()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = wire_grpc.GenerationServiceStub(channel)
        await _closed(stub, min(seconds, 5.0))  # warm-up
        for turn in range(turns):
            capacity = await _closed(stub, seconds / turns / 2)
            for name, phase, factor in (("capacity", at_capacity, 1), ("overload", above, FACTOR)):
                await asyncio.sleep(_LOG_S)
                seen = log.stat().st_size  # noqa: ASYNC240
                await _open(stub, factor * capacity, seconds / turns, random.Random(f"{name} {seed} {turn}"), phase)
                await asyncio.sleep(_LOG_S)
                _read_log(log, seen, phase)
    ratio = percentile(above.server_admitted_s, 0.99) / max(percentile(at_capacity.server_admitted_s, 0.99), 1e-9)
    refusal_s = percentile(above.server_refused_s, 0.99)
    wrong = at_capacity.wrong + above.wrong
    for phase in (at_capacity, above):
        for what, logged, seen_s in (
            ("refusals", phase.server_refused_s, phase.refused_s),
            ("generations", phase.server_admitted_s, phase.admitted_s),
        ):
            if len(logged) != len(seen_s):
                wrong.append(f"the log has {len(logged)} {what}, clients saw {len(seen_s)}")
    return {
        "running": RUNNING,
        "queue": QUEUE,
        "at_capacity": at_capacity.as_json(),
        f"at_{FACTOR}_times": above.as_json(),
        "admitted_p99_ratio": round(ratio, 3),
        "server_side_refused_p99_s": round(refusal_s, 4),
        "wrong": wrong[:20],
        "ok": not wrong and bool(above.refused_s) and ratio <= MAX_RATIO and refusal_s < MAX_REFUSAL_S,
    }


def _request(number: int) -> wire.GenerateRequest:
    request = wire.GenerateRequest(text=f"def function_{number}(self):\n", max_tokens=_TOKENS, ignore_eos=True)
    request.sampling.seed = number
    return request


async def _closed(stub: Any, seconds: float) -> float:
    """Completions a second with RUNNING requests always there."""
    began = time.monotonic()
    done = 0

    async def client(number: int) -> None:
        nonlocal done
        while time.monotonic() - began < seconds:
            async for _ in stub.Generate(_request(number)):
                pass
            done += 1

    await asyncio.gather(*map(client, range(RUNNING)))
    return done / (time.monotonic() - began)


async def _open(stub: Any, rate: float, seconds: float, rng: random.Random, phase: Phase) -> None:
    """Requests at `rate`, sent whether or not earlier ones are done."""
    phase.rates.append(rate)
    calls = []
    began = due = time.monotonic()
    while due - began < seconds:
        await asyncio.sleep(max(due - time.monotonic(), 0))
        calls.append(asyncio.ensure_future(_call(stub, len(calls), phase)))
        due += rng.expovariate(rate)
    await asyncio.gather(*calls)


async def _call(stub: Any, number: int, phase: Phase) -> None:
    began = time.monotonic()
    tokens = 0
    try:
        async for message in stub.Generate(_request(number)):
            tokens += len(message.delta.token_ids)
    except grpc.aio.AioRpcError as error:
        pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or pushback is None:
            phase.wrong.append(f"request {number}: {error.code().name} {error.details()}, pushback {pushback}")
        phase.refused_s.append(time.monotonic() - began)
        return
    phase.admitted_s.append(time.monotonic() - began)
    if tokens != _TOKENS:
        phase.wrong.append(f"request {number}: {tokens} tokens of {_TOKENS}")


def _read_log(log: Path, offset: int, phase: Phase) -> None:
    """Seconds from a call's arrival to its end, as the server's own log has them."""
    with log.open("rb") as file:
        file.seek(offset)
        for line in filter(lambda line: b'"method": "Generate"' in line, file):
            call = json.loads(line)
            if call["status"] == "OK":
                phase.server_admitted_s.append(float(call["seconds"]))
            elif call["status"] == "RESOURCE_EXHAUSTED":
                phase.server_refused_s.append(float(call["seconds"]))
