"""`make bench`: every figure of the README, as JSON lines on stdout; QUICK=1 for a shorter run."""

from __future__ import annotations

import argparse
import os

import torch

from tests.bench.deciding import deciding
from tests.bench.decoding import beside_plain, beside_transformers, cost_by_rows, long_context
from tests.bench.host import host_time
from tests.bench.measure import add_subject, emit, subject_of
from tests.bench.serving import serving
from tests.bench.tracing import tracing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    stages = ["transformers", "dspark", "context", "rows", "host", "deciding", "serving", "tracing"]
    parser.add_argument("--only", choices=stages)
    dspark = parser.add_argument_group("--only dspark, of another model")
    add_subject(dspark)
    dspark.add_argument("--domains", type=lambda text: text.split(","), default=["code", "arithmetic"])
    dspark.add_argument("--temperatures", type=lambda text: [float(t) for t in text.split(",")], default=[0.0, 1.0])
    options = parser.parse_args()
    quick = bool(os.environ.get("QUICK"))
    repeats = 3 if quick else 7
    emit(name="machine", torch=torch.__version__, threads=options.threads, cpus=os.cpu_count())
    if options.only in (None, "transformers"):
        beside_transformers(options.threads, repeats)
    if options.only in (None, "dspark"):
        beside_plain(
            options.threads,
            6 if quick else 24,
            options.domains,
            subject_of(options),
            options.temperatures,
        )
    if options.only in (None, "context"):
        long_context(options.threads, repeats)
    if options.only in (None, "rows"):
        cost_by_rows(options.threads, repeats)
    if options.only in (None, "host"):
        host_time(options.threads, 100 if quick else 300)
    if options.only in (None, "deciding"):
        deciding(options.threads, 100 if quick else 300, 10.0 if quick else 60.0)
    if options.only in (None, "serving"):
        serving(options.threads, repeats)
    if options.only in (None, "tracing"):
        tracing(options.threads, 20.0 if quick else 120.0)


if __name__ == "__main__":
    main()
