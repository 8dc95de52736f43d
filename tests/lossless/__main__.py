"""`python -m tests.lossless`: the losslessness table on stdout, progress on stderr; exit code 1 if a line fails."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from tests.lossless.jobs import Line, bits, counterexample, law, prepare, seeds, texts


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(lines: list[Line]) -> str:
    """Lines grouped by part, each with a verdict and its figures."""
    text: list[str] = []
    width = max(len(line["arm"]) for line in lines)
    for part in dict.fromkeys(line["part"] for line in lines):
        text += ["", part]
        for line in lines:
            if line["part"] == part:
                figures = [f"{k}={shown(v)}" for k, v in line.items() if k not in ("part", "arm", "passed")]
                text.append(f"  {'ok  ' if line['passed'] else 'FAIL'}  {line['arm']:{width}s}  {'  '.join(figures)}")
    return "\n".join(text[1:])


def main() -> int:
    quick = bool(os.environ.get("QUICK"))
    parser = argparse.ArgumentParser(prog="python -m tests.lossless", description=__doc__)
    parser.add_argument("--samples", type=int, default=5_000 if quick else 100_000, help="requests an arm")
    parser.add_argument("--seeds", type=int, default=100 if quick else 1_000, help="seeds of the coupled part")
    parser.add_argument("--texts", type=int, default=8 if quick else 40, help="held-out prompts of the greedy part")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args()
    prepare()
    from tests.lossless.arms import honest, mutants

    arms = [*honest(), *mutants()]
    # The longest first, so that the processes end together.
    order = sorted(range(len(arms)), key=lambda index: arms[index].running)
    jobs: list[tuple[Callable[..., list[Line]], tuple[int, ...]]] = [
        (seeds, (options.seeds,)),
        *((law, (index, options.samples)) for index in order),
        (bits, (max(options.seeds // 5, 40),)),
        (texts, (options.texts, 48)),
        (counterexample, ()),
    ]
    started = time.monotonic()
    done: dict[int, list[Line]] = {}
    with ProcessPoolExecutor(options.processes, get_context("spawn"), prepare) as pool:
        futures = {pool.submit(job, *values): number for number, (job, values) in enumerate(jobs)}
        for future in as_completed(futures):
            lines = done[futures[future]] = future.result()
            for line in lines:
                verdict = "ok" if line["passed"] else "FAIL"
                print(f"[{time.monotonic() - started:6.0f} s] {verdict:4s} {line['arm']}", file=sys.stderr, flush=True)
    lines = [line for number in sorted(done) for line in done[number]]
    lines.sort(key=lambda line: not line["part"].startswith("exact"))
    failed = sum(not line["passed"] for line in lines)
    if options.json:
        for line in lines:
            print(json.dumps(line))
    else:
        print(table(lines))
        print(f"\n{len(lines) - failed} of {len(lines)} hold, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
