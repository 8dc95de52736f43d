"""`make bench-peers`: others and ours on the same weights, prompts, threads and lengths, greedy, in one run.

    python -m tests.bench.peers install [NAME …]     an environment for each peer, below build/peers; says what it does
    python -m tests.bench.peers run [--workloads …] [--arms …]

One JSON line per (workload, arm, number of requests) on stdout, tables and progress on stderr; both in --out. Every
arm stays in a process of its own and waits while the others are measured, in turns, in alternating order. A peer that
is not installed, or does not run, is left out and the reason named. QUICK=1 for a shorter run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from tests.bench.measure import ROOT, emit, say
from tests.bench.peers import arms, machine, report
from tests.bench.peers.arms import NAMES, Arm, Unusable
from tests.bench.peers.environments import BUILD, ENVIRONMENTS
from tests.bench.peers.workloads import Workload, embedded, gemma, random_qwen3

SETTLE_S = 0.3  # idle threads of the last arm's pools spin for a while
DTYPES = ("bfloat16", "float32")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whatever was started is ended
    given = _parser().parse_args()
    if given.command == "install":
        return _install(given.names)
    return _run(given)


def _parser() -> argparse.ArgumentParser:
    quick = bool(os.environ.get("QUICK"))
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="make the peers' environments")
    install.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(ENVIRONMENTS)}")
    run = commands.add_parser("run", help="measure")
    add = run.add_argument
    add("--workloads", type=_names(WORKLOADS), default=list(WORKLOADS), metavar="NAME,…", help=", ".join(WORKLOADS))
    add("--arms", type=_names(NAMES), default=list(NAMES), metavar="NAME,…", help=", ".join(NAMES))
    add("--counts", type=lambda text: tuple(map(int, text.split(","))), metavar="N,…", help="requests at once")
    add("--repeats", type=int, default=3 if quick else 5, help="default 5, QUICK 3")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--gemma", type=Path, metavar="DIR", help="a conversion to take in place of that of `make real`")
    add("--gemma-draft", type=Path, metavar="DIR", help="a drafter for it")
    add("--wait", action="store_true", help="start everything, then wait for a line on stdin (until it is quiet)")
    add("--out", type=Path, default=ROOT / "results" / "local" / "peers", help="default results/local/peers")
    return parser


def _names(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse


def _install(names: list[str]) -> int:
    if unknown := [name for name in names if name not in ENVIRONMENTS]:
        say(f"{', '.join(unknown)}: no such peer; there are {', '.join(ENVIRONMENTS)}")
        return 2
    for name in names or ENVIRONMENTS:
        ENVIRONMENTS[name].install()  # what cannot be installed has said so, and is left out of runs
    return 0


WORKLOADS: dict[str, Callable[[argparse.Namespace], Workload]] = {
    "random": lambda given: random_qwen3(BUILD / "weights"),
    "embedded-bfloat16": lambda given: embedded("bfloat16"),
    **{f"gemma-{t}": lambda given, t=t: gemma(t, given.gemma, given.gemma_draft) for t in DTYPES},  # type: ignore[misc]
}


def _run(given: argparse.Namespace) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [machine.describe(given.threads)]
    emit(**lines[0])
    tables = [_caption(lines[0])]
    for name in given.workloads:
        try:
            workload = WORKLOADS[name](given)
        except LoadError as error:
            say(f"{name} is left out: {error}")
            continue
        found, shown = _measure(workload, given)
        for line in found:
            emit(**line)
        lines += found
        tables.append(shown)
    (given.out / "peers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (given.out / "peers.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    say("\n\n".join(tables))
    return 0


def _caption(described: dict[str, Any]) -> str:
    kinds = ", ".join(described["instructions"])
    return f"{described['date']}, {described['cpu']} ({kinds}), {described['threads']} threads, greedy."


def _measure(workload: Workload, given: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """JSON lines and the table of one workload."""
    began = time.perf_counter()
    counts = given.counts or workload.counts
    running, left_out = arms.start(workload, given.arms, given.threads)
    points: dict[tuple[str, int], report.Point] = {}
    bandwidth, cut = float("nan"), False
    try:
        for count in sorted({min(counts), max(counts)}):
            for arm in list(running):
                _decode(arm, workload, count, running, left_out, warm=True)
        if given.wait:
            say(f"{workload.name}: all is ready, and a line on stdin starts the measurement")
            sys.stdin.readline()
        bandwidth = machine.read_gb_s(given.threads)
        for count in counts:
            _turns(workload, count, given.repeats, running, left_out, points)
    except (KeyboardInterrupt, SystemExit):
        cut = True  # what there is, is shown
    finally:
        arms.stop(running)
    kept = sorted(points.values(), key=lambda point: (NAMES.index(point.arm), point.requests))
    floor = bandwidth * 1e9 / machine.weight_bytes(workload.directory, workload.dtype)
    about = {
        "name": "workload",
        "workload": workload.name,
        "about": workload.about,
        "dtype": workload.dtype,
        "read_gb_s": round(bandwidth, 2),
        "floor_tokens_per_s": round(floor, 1),
        "versions": {arm.name: arm.versions for arm in running if arm.versions},
        "notes": {arm.name: arm.note for arm in running if arm.note},
        "left_out": left_out,
        "load_1min": round(os.getloadavg()[0], 2),
        "cut_short": cut,
        "seconds": round(time.perf_counter() - began, 1),
    }
    shown = report.table(f"{workload.about}; {workload.dtype}", kept, [a.name for a in running if a.single], left_out)
    shown += f"\n\nReading the weights once a token at the {bandwidth:.1f} GB/s measured beside: {floor:,.0f} tokens/s."
    for name, note in about["notes"].items():  # type: ignore[attr-defined]
        shown += f" {name}: {note}."
    return [about, *({"name": "peer", **line} for line in report.records(kept))], shown


def _turns(
    workload: Workload,
    count: int,
    repeats: int,
    running: list[Arm],
    left_out: dict[str, str],
    points: dict[tuple[str, int], report.Point],
) -> None:
    """All arms in turns at one number of requests; fills `points`."""
    for repeat in range(repeats):
        for arm in running[:] if repeat % 2 == 0 else running[::-1]:
            if (done := _decode(arm, workload, count, running, left_out)) is None:
                continue
            point = points.setdefault((arm.name, count), report.Point(workload.name, arm.name, count))
            point.tokens_per_s_repeats.append(count * workload.tokens / done[0])
            point.texts = done[1]
    said = (f"{name} {point.tokens_per_s:.0f}" for (name, n), point in points.items() if n == count)
    say(f"{workload.name}, {count} at once: {', '.join(said)} tokens/s")


def _decode(
    arm: Arm, workload: Workload, count: int, running: list[Arm], left_out: dict[str, str], warm: bool = False
) -> arms.Decoded | None:
    """One turn of an arm; one that fails is left out from then on."""
    if arm.single and count > 1:
        return None
    time.sleep(SETTLE_S)
    try:
        return arm.generate(workload.prompts[:count], min(16, workload.tokens) if warm else workload.tokens)
    except Unusable as error:
        say(f"{workload.name}: {arm.name} is left out: {error}")
        left_out[arm.name] = str(error)
        running.remove(arm)
        if all(other.process is not arm.process for other in running):
            arm.process.stop()
        return None


if __name__ == "__main__":
    sys.exit(main())
