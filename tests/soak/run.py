"""Runs a soak's jobs against a server, and judges every answer."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

from clients.errors import to_error
from tests.soak.plan import TEXTS, Fate, Job, known

STALL_S = 1.0  # a stalled reader takes nothing for this long, then leaves
_CANCEL_CODES = {"CANCELLED", "OK"}
ALLOWED = {
    Fate.READ: {"OK"},
    Fate.CANCEL: _CANCEL_CODES,
    Fate.DEADLINE: {"OK", "DEADLINE_EXCEEDED"},
    Fate.MALFORMED: {"INVALID_ARGUMENT"},
    Fate.STALL: _CANCEL_CODES | {"RESOURCE_EXHAUSTED"},
}
# A call that is cut off from here may end differently there, or never arrive; these ends only the server can make.
SAME_CODES = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
SERVER_CODES = {*SAME_CODES, "OK", "CANCELLED", "DEADLINE_EXCEEDED"}
# Bounds the transport's own buffers, so that a reader that stalls is felt.
_NARROW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


class Known(NamedTuple):
    """What a request gives when it is decoded alone, without speculation."""

    tokens: list[int]
    text: str
    reason: int


@dataclass
class Report:
    """What happened. `wrong` says how to repeat each fault."""

    requests: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    whole_texts: int = 0
    prefixes: int = 0
    leaked: int = 0  # pages
    memory: list[tuple[int, int]] = field(default_factory=list)  # (requests done, bytes of all processes)

    def drift(self) -> float:
        """Growth of memory from the second fifth to the last, as a share."""
        if len(self.memory) < 10:
            return 0.0
        fifth = len(self.memory) // 5
        early = [size for _, size in self.memory[fifth : 2 * fifth]]
        late = [size for _, size in self.memory[-fifth:]]
        return (sum(late) / len(late)) / (sum(early) / len(early)) - 1


async def reference(address: str) -> list[Known]:
    """The known texts, each decoded alone and without speculation."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = wire_grpc.GenerationServiceStub(channel)
        return [await decode(stub, index, wire.SPECULATION_MODE_OFF) for index in range(TEXTS)]


async def decode(stub: Any, index: int, mode: wire.SpeculationMode = wire.SPECULATION_MODE_UNSPECIFIED) -> Known:
    """One of the known texts, decoded now."""
    request = known(index)
    request.speculation.mode = mode
    tokens, text, reason = list[int](), "", 0
    async for message in stub.Generate(request):
        tokens += message.delta.token_ids
        text += message.delta.text
        if message.HasField("finished"):
            reason = message.finished.reason
    return Known(tokens, text, reason)


async def soak(address: str, pid: int, jobs: Iterable[Job], texts: list[Known], concurrent: int = 64) -> Report:
    """Runs all jobs, `concurrent` at once."""
    report = Report()
    waiting = iter(jobs)
    async with _stubs(address) as (stub, narrow):

        async def worker() -> None:
            for job in waiting:
                await _one(narrow if job.fate is Fate.STALL else stub, job, texts, report)

        watching = asyncio.ensure_future(_watch_memory(pid, report))
        try:
            await asyncio.gather(*(worker() for _ in range(concurrent)))
        finally:
            watching.cancel()
        await _settled(stub, report)
    return report


@asynccontextmanager
async def _stubs(address: str) -> AsyncIterator[tuple[Any, Any]]:
    # Connections of their own: options differ, so that they do not share one.
    async with grpc.aio.insecure_channel(address) as one, grpc.aio.insecure_channel(address, options=_NARROW) as two:
        yield wire_grpc.GenerationServiceStub(one), wire_grpc.GenerationServiceStub(two)


async def _one(stub: Any, job: Job, texts: list[Known], report: Report) -> None:
    call = stub.Generate(job.request, timeout=job.timeout_s)
    tokens, text, reason, usage = list[int](), "", 0, -1
    messages = 0
    violations: tuple[Any, ...] = ()
    try:
        if job.fate is Fate.STALL:
            await asyncio.sleep(STALL_S)
            call.cancel()
        async for message in call:
            messages += 1
            tokens += message.delta.token_ids
            text += message.delta.text
            if message.HasField("finished"):
                reason, usage = message.finished.reason, message.finished.usage.completion_tokens
            if job.fate is Fate.CANCEL and messages > job.after:
                call.cancel()
                break
    except grpc.aio.AioRpcError as error:
        violations = to_error(error).violations
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
    code = (await call.code()).name
    report.requests += 1
    report.codes[f"{job.fate.value}: {code}"] += 1
    where = f"job {job.number} ({job.fate.value}, text {job.text})"
    if code not in ALLOWED[job.fate]:
        report.wrong.append(f"{where}: {code} {await call.details()}")
    elif job.fate is Fate.MALFORMED and not violations:
        report.wrong.append(f"{where}: {code} without the field's name: {await call.details()}")
    elif job.text >= 0:
        whole = code == "OK" and job.fate is not Fate.CANCEL
        _compare(Known(tokens, text, reason), texts[job.text], whole=whole, where=where, report=report)
        if whole and usage != len(tokens):
            report.wrong.append(f"{where}: {len(tokens)} tokens came, usage counts {usage}")


def _compare(got: Known, text: Known, *, whole: bool, where: str, report: Report) -> None:
    """What came is the reference, or its beginning where the call was cut short."""
    if whole:
        report.whole_texts += 1
        right = got == text
    else:
        report.prefixes += 1
        right = got.tokens == text.tokens[: len(got.tokens)] and text.text.startswith(got.text)
    if not right:
        pairs = enumerate(zip(got.tokens, text.tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(got.tokens), len(text.tokens)))
        report.wrong.append(
            f"{where}: {len(got.tokens)} tokens, the reference has {len(text.tokens)}; they part at {at};"
            f" the text ends {got.text[-20:]!r}, the reference {text.text[-20:]!r}"
        )


async def _settled(stub: Any, report: Report) -> None:
    """Everything that was cut short gives its pages back."""
    load = wire.Load()
    for _ in range(400):
        load = (await stub.GetModelInfo(wire.GetModelInfoRequest())).load
        if not (load.running or load.waiting):
            break
        await asyncio.sleep(0.05)
    if load.running or load.waiting:
        report.wrong.append(f"{load.running} requests run and {load.waiting} wait after the last one ended")
    elif load.pages_free + load.pages_cached != load.pages_total:
        report.leaked = load.pages_total - load.pages_free - load.pages_cached
        report.wrong.append(f"pages leaked: {load.pages_free} free + {load.pages_cached} cached of {load.pages_total}")


async def server_codes(log: Path, offset: int, report: Report) -> Counter[str]:
    """How the server's own log says that the generations ended; what it should not say is added to `report.wrong`."""
    await asyncio.sleep(1)  # a call's line comes after its answer
    codes: Counter[str] = Counter()
    with log.open("rb") as file:
        file.seek(offset)
        for line in filter(lambda line: b'"method": "Generate"' in line, file):
            codes[json.loads(line)["status"]] += 1
    seen = {code: sum(n for name, n in report.codes.items() if name.endswith(f": {code}")) for code in SAME_CODES}
    for code in set(codes) - SERVER_CODES:
        report.wrong.append(f"the server ended {codes[code]} generations with {code}")
    for code, count in seen.items():
        if codes[code] != count:
            report.wrong.append(f"the server ended {codes[code]} generations with {code}, clients saw {count}")
    return codes


async def _watch_memory(pid: int, report: Report) -> None:
    while True:
        report.memory.append((report.requests, memory(pid)))
        await asyncio.sleep(0.5)


def memory(pid: int) -> int:
    """Resident bytes of the server and its children."""
    server = psutil.Process(pid)
    total = 0
    for process in (server, *server.children()):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
