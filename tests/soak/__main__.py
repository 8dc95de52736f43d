"""`make soak`: 10,000 requests, 64 at once, many of them cut short or wrong; then 20 killed engines; then a drain;
then ten times more requests than a server takes.

QUICK=1 is 600 requests, 3 kills and shorter loads. Prints one JSON object on stdout, and a table of what was asked and
what came on stderr; exit code 0 when nothing was lost, wrong, leaked or late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tests.e2e.conftest import Process, engine_of, start
from tests.soak.faults import drain, kills
from tests.soak.overload import FLAGS, overload
from tests.soak.plan import jobs
from tests.soak.run import reference, server_codes, soak
from tests.soak.table import table

MAX_DRIFT = 0.05
STARTS = 4
LONG_ENOUGH = 5000  # requests; in a shorter run all is warm-up


def main() -> int:
    """Returns 0 when everything holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    quick = os.environ.get("QUICK", "") not in ("", "0")
    add = parser.add_argument
    add("--count", type=int, default=600 if quick else 10_000, help="requests; 0: none")
    add("--kills", type=int, default=3 if quick else 20, help="engines to kill; 0: none")
    add("--concurrent", type=int, default=64)
    add("--overload-seconds", type=float, default=8 if quick else 60, help="at capacity, and above; 0: none")
    add("--seed", type=int, default=1)
    given = parser.parse_args()
    result: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ["--max-running", str(given.concurrent), "--max-queue", "1000", "--drain-seconds", "120"]
        _say("a first start, which may compile, and some more")
        cold_starts_s = []
        for number in range(STARTS):
            started = time.monotonic()
            with _server(flags, folder / f"log-{number}"):
                cold_starts_s.append(time.monotonic() - started)
        log = folder / "log"
        with _server(flags, log) as process:
            result |= asyncio.run(_run(given, process, median(cold_starts_s[1:])))
        result["end"] = _end(process, log)
        if given.overload_seconds:
            _say(f"overload: {given.overload_seconds:g} s at capacity and as long above it, in turns")
            log = folder / "overload-log"
            with _server(FLAGS, log) as process:
                result["overload"] = asyncio.run(overload(process.address, log, given.overload_seconds, given.seed))
            result["overload_end"] = _end(process, log)
    result["ok"] = all(part["ok"] for part in result.values())
    result["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result, indent=2))
    _say(table(result))
    return 0 if result["ok"] else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _server(flags: Sequence[str], log: Path) -> Iterator[Process]:
    process = start(flags, log)
    try:
        yield process
    finally:
        process.stop()


def _end(process: Process, log: Path) -> dict[str, Any]:
    """How a stopped server ended."""
    text = log.read_text()
    if tracebacks := text.count("Traceback"):
        _say(text[max(text.index("Traceback") - 500, 0) :][:4000])
    code = process.popen.returncode
    return {"exit_code": code, "tracebacks": tracebacks, "ok": code == 0 and not tracebacks}


async def _run(given: argparse.Namespace, process: Process, cold_start_s: float) -> dict[str, Any]:
    result: dict[str, Any] = {}
    _say("references")
    texts = await reference(process.address)
    if given.count:
        _say(f"{given.count} requests, {given.concurrent} at once")
        result["soak"] = await _soak(given, process, texts)
        _say(json.dumps(result["soak"]))
    if given.kills:
        _say(f"{given.kills} kills")
        result["kills"] = await kills(process.address, lambda: engine_of(process), given.kills, cold_start_s, texts)
        _say(json.dumps(result["kills"]))
    _say("drain")
    result["drain"] = await drain(process.address, process.popen.terminate, given.concurrent)
    await asyncio.to_thread(process.popen.wait, 60)  # a second signal would end it at once
    return result


async def _soak(given: argparse.Namespace, process: Process, texts: list[Any]) -> dict[str, Any]:
    seen, began = process.log_path.stat().st_size, time.monotonic()
    report = await soak(process.address, process.popen.pid, jobs(given.count, given.seed), texts, given.concurrent)
    seconds = time.monotonic() - began
    server_side = await server_codes(process.log_path, seen, report)
    return {
        "requests": report.requests,
        "seconds": round(seconds, 1),
        "codes": dict(sorted(report.codes.items())),
        "server_side_codes": dict(sorted(server_side.items())),
        "whole_texts_compared": report.whole_texts,
        "beginnings_compared": report.prefixes,
        "wrong": report.wrong[:20],
        "wrong_count": len(report.wrong),
        "pages_leaked": report.leaked,
        "memory_mb": round(report.memory[-1][1] / 2**20) if report.memory else None,
        "memory_drift": round(report.drift(), 4),
        "drift_counts": given.count >= LONG_ENOUGH,
        "ok": not report.wrong and (report.drift() < MAX_DRIFT or given.count < LONG_ENOUGH),
    }


if __name__ == "__main__":
    sys.exit(main())
