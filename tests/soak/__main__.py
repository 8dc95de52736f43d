"""`make soak`: 10,000 requests, 64 at once, many of them cut short or wrong; then 20 killed engines; then a drain.

QUICK=1 is 600 requests and 3 kills. Prints one JSON object; exit code 0 when nothing was lost, wrong or leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Process, engine_of, start
from tests.soak.plan import jobs
from tests.soak.run import drain, kills, reference, soak

MAX_DRIFT = 0.05


def main() -> int:
    """Returns 0 when everything holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser.add_argument("--count", type=int, default=600 if quick else 10_000)
    parser.add_argument("--kills", type=int, default=3 if quick else 20)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start(["--log-level", "warning", "--max-queue", "1000", "--drain-seconds", "120"], log)
        try:
            result = asyncio.run(_run(given, process))
        finally:
            result_code = process.stop()
        result["exit_code"] = result_code
        text = log.read_text()
        result["tracebacks"] = text.count("Traceback")
    good = result["soak"]["ok"] and result["kills"]["ok"] and result["drain"]["ok"]
    result["ok"] = bool(good and result_code == 0 and not result["tracebacks"])
    print(json.dumps(result, indent=2))
    if result["tracebacks"]:
        print(text[:4000], file=sys.stderr)
    return 0 if result["ok"] else 1


async def _run(given: argparse.Namespace, process: Process) -> dict[str, Any]:
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
    killed = await kills(process.address, lambda: engine_of(process), given.kills) if given.kills else {"ok": True}
    print(json.dumps(killed), file=sys.stderr)
    drained = await drain(process.address, process.popen.terminate)
    return {"soak": soaked, "kills": killed, "drain": drained}


if __name__ == "__main__":
    sys.exit(main())
