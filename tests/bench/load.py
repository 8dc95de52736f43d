"""`make bench-load`: every arm at every concurrency, through real servers over gRPC; QUICK=1 for a shorter run.

One JSON line per (arm, concurrency) on stdout; progress and the summary on stderr. In --out: the same lines
(points.jsonl), summary.json, the two figures, and what `python -m engine.schedule predict` needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop

from clients.client import Client
from clients.scheduler import Record, SchedulerClient
from tests.bench.load_arms import Arm, Server, choose
from tests.bench.load_client import Job, Load, Segment, mixed_jobs
from tests.bench.load_plots import draw, matplotlib_missing
from tests.bench.load_report import Point, summarise, text
from tests.bench.load_workload import read_tables, write_profiles
from tests.bench.measure import ROOT, add_subject, emit, say, subject_of

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
QUICK_CONCURRENCIES = (1, 4, 16, 64)
IDLE_SHARE = 0.01  # of a core that an idle server may use before it disturbs the others


@dataclass(slots=True)
class Sweep:
    """Everything that was measured, by (arm, concurrency)."""

    segments: dict[tuple[str, int], list[Segment]] = field(default_factory=dict)
    records: dict[tuple[str, int], list[Record]] = field(default_factory=dict)
    front_cpu_s: dict[tuple[str, int], float] = field(default_factory=dict)
    engine_cpu_s: dict[tuple[str, int], float] = field(default_factory=dict)
    client_cpu_s: dict[tuple[str, int], float] = field(default_factory=dict)
    idle_cpu_s: dict[str, float] = field(default_factory=dict)
    idle_s: dict[str, float] = field(default_factory=dict)


def main() -> int:
    given = _parser().parse_args()
    if not given.no_plots and (missing := matplotlib_missing()):
        print(missing, file=sys.stderr)
        return 2
    subject = subject_of(given)
    arms = choose(given.arms, subject)
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    servers: list[Server] = []
    try:
        servers += (Server(arm, subject, given.threads, given.out / "costs") for arm in arms)
        sweep = uvloop.run(_sweep(servers, given))
    finally:
        for server in servers:
            server.stop()
    points = _points(arms, sweep)
    (given.out / "points.jsonl").write_text("".join(json.dumps(point.as_dict()) + "\n" for point in points))
    tables = read_tables(given.out / "costs")
    write_profiles(given.out / "profiles.json", arms, subject, sweep.records, tables)
    summary = summarise(points, sweep.records, tables)
    summary["minutes"] = round((time.perf_counter() - started) / 60, 1)
    (given.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for point in points:
        emit(**point.as_dict())
    say(text(summary))
    if not given.no_plots:
        for path in draw(points, given.out):
            say(f"drew {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    quick = bool(os.environ.get("QUICK"))
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    add = parser.add_argument
    add("--arms", type=lambda text: text.split(","), default=[], metavar="NAME,…", help="default: all that are shipped")
    add("--concurrency", type=concurrencies, default=QUICK_CONCURRENCIES if quick else CONCURRENCIES, metavar="N,…")
    add("--repeats", type=int, default=3 if quick else 7, help="default 7, QUICK 3")
    add("--seconds", type=float, default=2.5 if quick else 4.0, help="of steady load, each (default 4, QUICK 2.5)")
    add("--temperature", type=float, default=1.0, help="default %(default)s, unseeded: verified by rejection")
    add("--threads", type=int, help="of each engine (default: the server's own)")
    add("--out", type=Path, default=ROOT / "results" / "local" / "load", help="default results/local/load")
    add("--no-plots", action="store_true")
    add_subject(parser)
    return parser


def concurrencies(text: str) -> tuple[int, ...]:
    """Numbers of requests at once, of a flag."""
    found = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of at least 1, as 1,4,16")
    return found


async def _sweep(servers: list[Server], given: argparse.Namespace) -> Sweep:
    sweep, jobs = Sweep(), mixed_jobs(subject_of(given))
    for server in servers:
        await Load(server.address, jobs, min(4, max(given.concurrency)), given.temperature, "warm").measure(1.0)
    for concurrency in given.concurrency:
        for repeat in range(given.repeats):
            for server in servers if repeat % 2 == 0 else reversed(servers):
                await _measure(server, servers, jobs, concurrency, repeat, sweep, given)
        for server in servers:
            await _record(server, jobs, concurrency, sweep, given)
        say(
            f"{concurrency} at once: " + ", ".join(_progress(server.arm.name, concurrency, sweep) for server in servers)
        )
    return sweep


def _progress(name: str, concurrency: int, sweep: Sweep) -> str:
    return f"{name} {max(s.tokens_per_s for s in sweep.segments[name, concurrency]):.0f}"


async def _measure(
    server: Server,
    servers: list[Server],
    jobs: Sequence[Job],
    concurrency: int,
    repeat: int,
    sweep: Sweep,
    given: argparse.Namespace,
) -> None:
    """One segment; meanwhile the others must be idle."""
    key = server.arm.name, concurrency
    others = {other.arm.name: sum(other.cpu_s()) for other in servers if other is not server}
    (front, engine), own, began = server.cpu_s(), _own_cpu_s(), time.perf_counter()
    load = Load(server.address, jobs, concurrency, given.temperature, f"{concurrency}-{repeat}")
    segment = await load.measure(given.seconds, offset=repeat * 37)
    passed = time.perf_counter() - began
    sweep.segments.setdefault(key, []).append(segment)
    scale = segment.seconds / passed  # the load was about the same before and after the window
    for totals, before, after in (
        (sweep.front_cpu_s, front, server.cpu_s()[0]),
        (sweep.engine_cpu_s, engine, server.cpu_s()[1]),
        (sweep.client_cpu_s, own, _own_cpu_s()),
    ):
        totals[key] = totals.get(key, 0.0) + (after - before) * scale
    for other in servers:
        if other is not server:
            name = other.arm.name
            sweep.idle_cpu_s[name] = sweep.idle_cpu_s.get(name, 0.0) + sum(other.cpu_s()) - others[name]
            sweep.idle_s[name] = sweep.idle_s.get(name, 0.0) + passed
            if sweep.idle_s[name] > 20 and sweep.idle_cpu_s[name] > IDLE_SHARE * sweep.idle_s[name]:
                say(f"{name} idles on {sweep.idle_cpu_s[name] / sweep.idle_s[name]:.1%} of a core: figures suffer")


async def _record(
    server: Server, jobs: Sequence[Job], concurrency: int, sweep: Sweep, given: argparse.Namespace
) -> None:
    """A segment that is watched, and so not among the measured ones."""
    records = sweep.records[server.arm.name, concurrency] = []
    async with Client(server.address) as client:

        async def watch() -> None:
            async for batch in SchedulerClient(client).watch(buffer=4096):
                records.extend(batch.records)

        watching = asyncio.ensure_future(watch())
        await asyncio.sleep(0.05)
        load = Load(server.address, jobs, concurrency, given.temperature, f"{concurrency}-watched")
        await load.measure(given.seconds)
        watching.cancel()
        await asyncio.wait([watching])


def _own_cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def _points(arms: list[Arm], sweep: Sweep) -> list[Point]:
    points = []
    for (name, concurrency), segments in sweep.segments.items():
        points.append(
            Point.of(
                name,
                concurrency,
                segments,
                cpu_s=tuple(
                    totals[name, concurrency] for totals in (sweep.front_cpu_s, sweep.engine_cpu_s, sweep.client_cpu_s)
                ),
            )
        )
    order = [arm.name for arm in arms]
    return sorted(points, key=lambda point: (order.index(point.arm), point.concurrency))


if __name__ == "__main__":
    sys.exit(main())
