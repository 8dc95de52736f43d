"""What traces and metrics cost: servers alike but for telemetry, each in turn for a moment under the same requests."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from clients.client import Client
from clients.events import Delta, Options
from engine.messages import TokenDelta
from server.boundary import Sample
from server.round_samples import Samples
from tests.bench.measure import EMBEDDED, emit, median, say
from tests.bench.serving import server
from tests.e2e.rotel_agent import rotel_agent
from tests.server.fake_engine import ScriptedEngine, record_of

TOKENS = 48
REQUESTS = {1: 3, 8: 8}  # in a burst of a fifth of a second or so, by how many at a time
TRIM = 0.1  # share of blocks left out at either end: those in which another process took the machine
RESAMPLES = 2000
SAMPLER = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
# The second arm without telemetry shows what the machine's own unrest makes of two equal arms.
ARMS: dict[str, str | None] = {"off": None, "off_again": None, "ten_percent": "0.1"}


@dataclass
class Arm:
    """One server, and what was measured on it, a value a burst."""

    address: str
    process: psutil.Process
    times: list[float] = field(default_factory=list)  # seconds a token
    costs: list[float] = field(default_factory=list)  # processor seconds a token, of the server and its engine

    def processor_s(self) -> float:
        """Time on a processor so far, to the nanosecond; what `cpu_times` says moves in steps of 10 ms."""
        total = 0
        for each in (self.process, *self.process.children(recursive=True)):
            for thread in Path(f"/proc/{each.pid}/task").glob("*/schedstat"):
                with suppress(OSError):  # it has ended
                    total += int(thread.read_text().split()[0])
        return total / 1e9


def tracing(threads: int, seconds: float) -> None:
    """Speed and processor time with metrics and 10 % of requests traced, beside those without either.

    Args:
        seconds: for each number of requests at a time.
    """
    round_cost()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint = stack.enter_context(rotel_agent(folder, "--exporter", "blackhole"))
        arms = {name: stack.enter_context(_arm(threads, endpoint, share)) for name, share in ARMS.items()}
        for concurrency in REQUESTS:
            say(f"tracing: {concurrency} at a time, {seconds:g} s")
            asyncio.run(_measure(arms, concurrency, seconds))
            _report(arms, concurrency, threads)


def round_cost() -> None:
    """What the engine's process pays a round for metrics; the least of many tries, which other work cannot touch."""
    for count in (1, 8):
        deltas = [
            TokenDelta(str(number), tokens=(1, 2, 3), decode_round=True, drafted=7, verified=7, accepted=2)
            for number in range(count)
        ]
        samples, record = Samples(ScriptedEngine([1])), record_of(1, deltas)
        samples.want(Sample(records_s=0.2, totals_s=1.0))
        tries = timeit.repeat(lambda samples=samples, record=record: samples.see(record), number=64, repeat=400)  # type: ignore[misc]
        emit(name="tracing_round", requests=count, microseconds=1e6 * min(tries) / 64)


@contextmanager
def _arm(threads: int, endpoint: str, share: str | None) -> Iterator[Arm]:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    if share is not None:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **SAMPLER, "OTEL_TRACES_SAMPLER_ARG": share}
    with server(threads, "--policy", "fixed", **variables) as (address, process, _):
        yield Arm(address, process)


async def _measure(arms: dict[str, Arm], concurrency: int, seconds: float) -> None:
    """Blocks of one burst an arm, in random order, until the time is over."""
    order = random.Random(concurrency)
    prompts = EMBEDDED.heldout("code")
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(Client(arm.address)) for name, arm in arms.items()}
        for name, arm in arms.items():
            arm.times.clear()
            arm.costs.clear()
            await _burst(clients[name], prompts, concurrency, 0)
        began, block = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            block += 1
            for name in order.sample(list(arms), len(arms)):
                arm = arms[name]
                processor_s, start = arm.processor_s(), time.perf_counter()
                tokens = await _burst(clients[name], prompts, concurrency, block)
                arm.times.append((time.perf_counter() - start) / tokens)
                arm.costs.append((arm.processor_s() - processor_s) / tokens)


async def _burst(client: Client, prompts: list[str], concurrency: int, block: int) -> int:
    """The same requests for every arm; texts differ between blocks, so that nothing is in a prefix cache."""
    requests = REQUESTS[concurrency]

    async def user(number: int) -> int:
        got = 0
        for turn in range(requests // concurrency):
            prompt = f"# {block}.{number}.{turn}\n{prompts[(block + number + turn) % len(prompts)]}"
            async for event in client.generate(prompt, Options(max_tokens=TOKENS, temperature=0, ignore_eos=True)):
                if isinstance(event, Delta):
                    got += len(event.token_ids)
        return got

    counts = await asyncio.gather(*(user(number) for number in range(concurrency)))
    if sum(counts) != requests * TOKENS:
        sys.exit("a request came back short")
    return sum(counts)


def _report(arms: dict[str, Arm], concurrency: int, threads: int) -> None:
    off = arms["off"]
    for name, arm in arms.items():
        slower, cost = ratio(arm.times, off.times), ratio(arm.costs, off.costs)
        emit(
            name="tracing",
            arm=name,
            concurrency=concurrency,
            threads=threads,
            blocks=len(arm.times),
            tokens_per_s=1 / median(arm.times),
            time_ratio=slower[0],
            time_low=slower[1],
            time_high=slower[2],
            cpu_ms_per_token=1e3 * median(arm.costs),
            cpu_ratio=cost[0],
            cpu_low=cost[1],
            cpu_high=cost[2],
        )


def ratio(arm: list[float], base: list[float]) -> tuple[float, float, float]:
    """How many times as much as the base, and its 90 % interval.

    The trimmed mean of the logarithms of each block's own ratio, so that what changes from block to block (the text,
    the machine's mood) falls on both; the interval by resampling blocks.
    """
    logs = [math.log(mine / theirs) for mine, theirs in zip(arm, base, strict=True)]
    draws = random.Random(0)
    found = sorted(_trimmed(draws.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    low, high = found[RESAMPLES // 20], found[-RESAMPLES // 20]
    return math.exp(_trimmed(logs)), math.exp(low), math.exp(high)


def _trimmed(values: list[float]) -> float:
    cut = int(len(values) * TRIM)
    return statistics.fmean(sorted(values)[cut : len(values) - cut])
