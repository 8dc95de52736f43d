"""`make bench-load`: every arm at every concurrency, through real servers over gRPC; QUICK=1 for a shorter run.

The arms take turns of a fifth of a second under the same load, so that a shared machine's moods fall on all of them
alike; while one server runs, the others are stopped in their tracks (SIGSTOP), and their users' clocks with them.

One JSON line per (arm, concurrency) on stdout; progress and the summary on stderr. In --out: the same lines
(points.jsonl), summary.json, the two figures, and what `python -m engine.schedule predict` needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from clients.client import Client
from clients.scheduler import Record, SchedulerClient
from tests.bench.load_arms import Arm, Server, choose
from tests.bench.load_client import Load, Segment, mixed_jobs
from tests.bench.load_plots import draw, matplotlib_missing
from tests.bench.load_report import Point, summarise, text
from tests.bench.load_workload import read_tables, write_profiles
from tests.bench.measure import ROOT, add_subject, emit, say, subject_of

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
QUICK_CONCURRENCIES = (1, 4, 16, 64)
TURN_S = 0.2


@dataclass(slots=True)
class Sweep:
    """Everything that was measured, by (arm, concurrency)."""

    segments: dict[tuple[str, int], list[Segment]] = field(default_factory=dict)
    records: dict[tuple[str, int], list[Record]] = field(default_factory=dict)
    server_cpu_s: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)  # front, engine


def main() -> int:
    given = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or stopped servers would stay behind
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


def parser() -> argparse.ArgumentParser:
    """The flags."""
    quick = bool(os.environ.get("QUICK"))
    made = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    add = made.add_argument
    add("--arms", type=lambda text: text.split(","), default=[], metavar="NAME,…", help="default: all that are shipped")
    add("--concurrency", type=concurrencies, default=QUICK_CONCURRENCIES if quick else CONCURRENCIES, metavar="N,…")
    add("--repeats", type=repeats, default=3 if quick else 7, help="default 7, QUICK 3")
    add("--seconds", type=seconds, default=2.5 if quick else 4.0, help="of steady load, each (default 4, QUICK 2.5)")
    add("--temperature", type=float, default=1.0, help="default %(default)s, unseeded: verified by rejection")
    add("--threads", type=int, help="of each engine (default: the server's own)")
    add("--out", type=Path, default=ROOT / "results" / "local" / "load", help="default results/local/load")
    add("--no-plots", action="store_true")
    add_subject(made)
    return made


def concurrencies(text: str) -> tuple[int, ...]:
    """Numbers of requests at once, of a flag."""
    found = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of at least 1, as 1,4,16")
    return found


def seconds(text: str) -> float:
    """A time of at least one turn, of a flag."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not TURN_S <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time of at least a turn, {TURN_S} seconds")
    return found


def repeats(text: str) -> int:
    """How often, of a flag."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


async def _sweep(servers: list[Server], given: argparse.Namespace) -> Sweep:
    sweep, jobs = Sweep(), mixed_jobs(subject_of(given))
    for server in servers:
        load = Load(server, jobs, min(4, max(given.concurrency)), given.temperature)
        await load.begin()
        await load.end()
    for concurrency in given.concurrency:
        loads = [Load(server, jobs, concurrency, given.temperature) for server in servers]
        for load in loads:
            await load.begin()
        await _take_turns(loads, concurrency, sweep, given)
        for load in loads:
            sweep.records[load.server.arm.name, concurrency] = await _record(load, given.seconds)
        for load in loads:
            await load.end()
        say(f"{concurrency} at once: " + ", ".join(_progress(s.arm.name, concurrency, sweep) for s in servers))
    return sweep


def _progress(name: str, concurrency: int, sweep: Sweep) -> str:
    return f"{name} {statistics.median(s.tokens_per_s for s in sweep.segments[name, concurrency]):.0f}"


async def _take_turns(loads: list[Load], concurrency: int, sweep: Sweep, given: argparse.Namespace) -> None:
    """All repeats of all arms; a repeat is as many turns as its seconds hold."""
    turns = round(given.seconds / TURN_S)
    before = [load.server.cpu_s() for load in loads]
    for repeat in range(given.repeats):
        segments = [Segment() for _ in loads]
        for turn in range(turns):
            for place in random.Random(repeat * turns + turn).sample(range(len(loads)), len(loads)):
                await loads[place].turn(segments[place], given.seconds / turns)
        for load, segment in zip(loads, segments, strict=True):
            sweep.segments.setdefault((load.server.arm.name, concurrency), []).append(segment)
    for load, (front, engine) in zip(loads, before, strict=True):
        after = load.server.cpu_s()
        sweep.server_cpu_s[load.server.arm.name, concurrency] = after[0] - front, after[1] - engine


async def _record(load: Load, seconds: float) -> list[Record]:
    """Some more of the load, watched, and so not among what is measured."""
    records: list[Record] = []
    with load.awake():
        async with Client(load.server.address) as client:

            async def watch() -> None:
                async for batch in SchedulerClient(client).watch(buffer=4096):
                    records.extend(batch.records)

            watching = asyncio.ensure_future(watch())
            await asyncio.sleep(seconds)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
    return records


def _points(arms: list[Arm], sweep: Sweep) -> list[Point]:
    points = []
    for (name, concurrency), segments in sweep.segments.items():
        points.append(
            Point.of(
                name,
                concurrency,
                segments,
                cpu_s=(*sweep.server_cpu_s[name, concurrency], sum(segment.client_cpu_s for segment in segments)),
            )
        )
    order = [arm.name for arm in arms]
    return sorted(points, key=lambda point: (order.index(point.arm), point.concurrency))


if __name__ == "__main__":
    sys.exit(main())
