"""What traces and metrics cost: servers alike but for telemetry, each in turn under the same requests."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from clients.client import Client
from clients.events import Delta, Options
from engine.messages import TokenDelta
from server.boundary import Sample
from server.round_samples import Samples
from tests.bench.measure import emit, heldout, median, say
from tests.bench.serving import server
from tests.e2e.rotel_agent import rotel_agent
from tests.server.fake_engine import ScriptedEngine, record_of

TOKENS = 64
REQUESTS = 8  # in a burst, shared out among the users
RESAMPLES = 2000
SAMPLER = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
# The second arm without telemetry shows what the machine's own unrest makes of two equal arms.
ARMS: dict[str, str | None] = {"off": None, "off_again": None, "ten_percent": "0.1", "all": "1.0"}


@dataclass
class Arm:
    """One server, and what was measured on it."""

    address: str
    process: psutil.Process
    speeds: list[float] = field(default_factory=list)  # tokens a second
    costs: list[float] = field(default_factory=list)  # processor seconds a token, of the server and its engine

    def processor_s(self) -> float:
        total = 0.0
        for each in (self.process, *self.process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system
        return total


def tracing(threads: int, repeats: int) -> None:
    """Speed and processor time with 10 % and all requests traced, and metrics, beside those without either."""
    round_cost()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint = stack.enter_context(rotel_agent(folder, "--exporter", "blackhole"))
        arms = {name: stack.enter_context(_arm(threads, endpoint, share)) for name, share in ARMS.items()}
        for concurrency in (1, 8):
            say(f"tracing: {concurrency} at a time")
            asyncio.run(_measure(arms, concurrency, repeats))
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
        tries = timeit.repeat(lambda samples=samples, record=record: samples.see(record), number=50, repeat=400)  # type: ignore[misc]
        emit(name="tracing_round", requests=count, microseconds=1e6 * min(tries) / 50)


@contextmanager
def _arm(threads: int, endpoint: str, share: str | None) -> Iterator[Arm]:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    if share is not None:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **SAMPLER, "OTEL_TRACES_SAMPLER_ARG": share}
    with server(threads, "--policy", "fixed", **variables) as (address, process, _):
        yield Arm(address, process)


async def _measure(arms: dict[str, Arm], concurrency: int, repeats: int) -> None:
    order = random.Random(concurrency)
    prompts = heldout("code")
    for arm in arms.values():
        arm.speeds.clear()
        arm.costs.clear()
        await _burst(arm, prompts, concurrency, 0)
    for repeat in range(1, repeats + 1):
        for name in order.sample(list(arms), len(arms)):
            arm = arms[name]
            loop, processor_s = asyncio.get_running_loop(), arm.processor_s()
            began = loop.time()
            tokens = await _burst(arm, prompts, concurrency, repeat)
            arm.speeds.append(tokens / (loop.time() - began))
            arm.costs.append((arm.processor_s() - processor_s) / tokens)
        if repeat % 3 == 0:
            say(f"  {repeat} of {repeats}")


async def _burst(arm: Arm, prompts: list[str], concurrency: int, repeat: int) -> int:
    """The same requests for every arm; texts differ between repeats, so that nothing is in a prefix cache."""
    async with Client(arm.address) as client:

        async def user(number: int) -> int:
            got = 0
            for turn in range(REQUESTS // concurrency):
                prompt = f"# {repeat}.{number}.{turn}\n{prompts[(number + turn) % len(prompts)]}"
                async for event in client.generate(prompt, Options(max_tokens=TOKENS, temperature=0, ignore_eos=True)):
                    if isinstance(event, Delta):
                        got += len(event.token_ids)
            return got

        counts = await asyncio.gather(*(user(number) for number in range(concurrency)))
    if sum(counts) != REQUESTS * TOKENS:
        sys.exit("a request came back short")
    return sum(counts)


def _report(arms: dict[str, Arm], concurrency: int, threads: int) -> None:
    off = arms["off"]
    for name, arm in arms.items():
        speed, cost = _ratio(arm.speeds, off.speeds), _ratio(arm.costs, off.costs)
        emit(
            name="tracing",
            arm=name,
            concurrency=concurrency,
            threads=threads,
            repeats=len(arm.speeds),
            tokens_per_s=median(arm.speeds),
            speed_ratio=speed[0],
            speed_low=speed[1],
            speed_high=speed[2],
            cpu_ms_per_token=1e3 * median(arm.costs),
            cpu_ratio=cost[0],
            cpu_low=cost[1],
            cpu_high=cost[2],
        )


def _ratio(arm: list[float], base: list[float]) -> tuple[float, float, float]:
    """Ratio of medians and its 90 % interval, by resampling repeats (pairs stay together)."""
    draws = random.Random(0)
    pairs = list(zip(arm, base, strict=True))
    ratios = []
    for _ in range(RESAMPLES):
        ours, theirs = zip(*draws.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(median(ours) / median(theirs))
    ratios.sort()
    return median(arm) / median(base), ratios[RESAMPLES // 20], ratios[-RESAMPLES // 20]
