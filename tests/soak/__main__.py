"""`make soak`: 10,000 requests, 64 at once, many of them cut short or wrong; then 20 killed engines; then a drain;
then ten times more requests than a server takes.

QUICK=1 is 600 requests, 3 kills and shorter loads. Prints one JSON object; exit code 0 when nothing was lost, wrong,
leaked or late.
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
from typing import Any

from tests.e2e.conftest import Process, engine_of, start
from tests.soak.faults import drain, kills
from tests.soak.overload import FLAGS, overload
from tests.soak.plan import jobs
from tests.soak.run import reference, soak

MAX_DRIFT = 0.05


def main() -> int:
    """Returns 0 when everything holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser.add_argument("--count", type=int, default=600 if quick else 10_000)
    parser.add_argument("--kills", type=int, default=3 if quick else 20)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--overload-seconds", type=float, default=8 if quick else 60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        began = time.monotonic()
        with _server(["--log-level", "warning", "--max-queue", "1000", "--drain-seconds", "120"], log) as process:
            result |= asyncio.run(_run(given, process, time.monotonic() - began))
        result["end"] = _end(process, log)
        if given.overload_seconds:
            log = Path(folder) / "overload-log"
            with _server(FLAGS, log) as process:
                result["overload"] = asyncio.run(overload(process.address, log, given.overload_seconds, given.seed))
            result["overload_end"] = _end(process, log)
    result["ok"] = all(part["ok"] for part in result.values())
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


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
        print(text[max(text.index("Traceback") - 500, 0) :][:4000], file=sys.stderr)
    code = process.popen.returncode
    return {"exit_code": code, "tracebacks": tracebacks, "ok": code == 0 and not tracebacks}


async def _run(given: argparse.Namespace, process: Process, cold_start_s: float) -> dict[str, Any]:
    texts = await reference(process.address)
    began = time.monotonic()
    report = await soak(process.address, process.popen.pid, jobs(given.count, given.seed), texts, given.concurrent)
    seconds = time.monotonic() - began
    long_enough = given.count >= 5000  # a short run is all warm-up
    soaked = {
        "requests": report.requests,
        "seconds": round(seconds, 1),
        "codes": dict(sorted(report.codes.items())),
        "whole_texts_compared": report.whole_texts,
        "beginnings_compared": report.prefixes,
        "wrong": report.wrong[:20],
        "wrong_count": len(report.wrong),
        "memory_mb": round(report.memory[-1][1] / 2**20) if report.memory else None,
        "memory_drift": round(report.drift(), 4),
        "ok": not report.wrong and (report.drift() < MAX_DRIFT or not long_enough),
    }
    print(json.dumps(soaked), file=sys.stderr)
    killed: dict[str, Any] = {"ok": True}
    if given.kills:
        killed = await kills(process.address, lambda: engine_of(process), given.kills, cold_start_s)
    print(json.dumps(killed), file=sys.stderr)
    drained = await drain(process.address, process.popen.terminate)
    await asyncio.to_thread(process.popen.wait, 60)  # a second signal would end it at once
    return {"soak": soaked, "kills": killed, "drain": drained}


if __name__ == "__main__":
    sys.exit(main())
