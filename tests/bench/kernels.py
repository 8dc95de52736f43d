"""`make bench-kernels`: every op's GB/s and FLOP/s beside what the device can do, as JSON lines on stdout.

    make bench-kernels                  the shapes of Qwen3-8B on a GPU
    make bench-kernels ARGS=--cpu       the embedded model's shapes on the CPU
    make bench-kernels ARGS="--only verify markov_sample"

The ceilings are measured first: a copy of a tensor that no cache holds, and a product of large square matrices in
the model's dtype. A case's bytes and operations are what the op cannot do without (tests/bench/registry.py). On a CPU
the embedded model's tensors live in caches, so that a case may be faster than the copy.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from kernels.threads import get_threads, set_threads
from tests.bench import layer_ops, sampling_ops  # noqa: F401  (they fill the registry)
from tests.bench.measure import emit, median, say, seconds
from tests.bench.registry import REGISTRY, Case, Sizes, embedded, qwen3_8b

NO_GPU = "bench-kernels: no GPU here, so there is nothing to time; ARGS=--cpu times the embedded model's shapes"
Timer = Callable[[Callable[[], object], Callable[[], object]], float]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the embedded model's shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=sorted(REGISTRY), default=sorted(REGISTRY), metavar="OP")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="with --cpu")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        say(NO_GPU)
        return 1
    if options.cpu:
        set_threads(options.threads)
        torch.set_num_threads(options.threads)
    sizes = embedded() if options.cpu else qwen3_8b(torch.device("cuda"))
    timer = on_cpu(options.repeats) if options.cpu else on_gpu(options.repeats)
    bandwidth, arithmetic = ceilings(sizes, timer)
    machine(sizes, bandwidth, arithmetic)
    for name in options.only:
        for case in REGISTRY[name](sizes):
            emit(**row(name, case, timer(case.run, case.reset or nothing), bandwidth, arithmetic))
    return 0


def nothing() -> None:
    """Resets a case that changes nothing."""


def row(name: str, case: Case, took: float, bandwidth: float, arithmetic: float) -> dict[str, object]:
    """A line of the table. `of_ceiling` is the share of the time that the slower of the two ceilings explains."""
    least = max(case.bytes / bandwidth, case.flops / arithmetic)
    rates = {"gb_s": case.bytes / took / 1e9, "gflop_s": case.flops / took / 1e9}
    return {"name": name, "shape": case.shape, "us": took * 1e6, **rates, "of_ceiling": least / took}


def ceilings(sizes: Sizes, timer: Timer) -> tuple[float, float]:
    """Bytes a second of a copy, read and written ones, and operations a second of a matrix product."""
    source = torch.zeros((1 << 30 if sizes.device.type == "cuda" else 1 << 28) // 4, device=sizes.device)
    target = torch.empty_like(source)
    copied = timer(lambda: target.copy_(source), nothing)
    side = 8192 if sizes.device.type == "cuda" else 1024
    a, b = sizes.normal(side, side), sizes.normal(side, side)
    return 2 * source.nbytes / copied, 2 * side**3 / timer(lambda: a @ b, nothing)


def machine(sizes: Sizes, bandwidth: float, arithmetic: float) -> None:
    gpu = sizes.device.type == "cuda"
    try:
        triton = version("triton") if gpu else None
    except PackageNotFoundError:
        triton = None
    emit(
        name="machine",
        device=torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {get_threads()} threads",
        torch=torch.__version__,
        triton=triton,
        cuda=torch.version.cuda if gpu else None,
        date=datetime.now(UTC).date().isoformat(),
        dtype=str(sizes.dtype).removeprefix("torch."),
        copy_gb_s=bandwidth / 1e9,
        matmul_gflop_s=arithmetic / 1e9,
    )


def on_cpu(repeats: int) -> Timer:
    """Median seconds of a call."""

    def measure(work: Callable[[], object], reset: Callable[[], object]) -> float:
        reset()
        work()  # compiles, the first time
        times: list[float] = []
        stop = time.perf_counter() + 1.0
        while len(times) < 3 or (len(times) < repeats and time.perf_counter() < stop):
            reset()
            times.append(seconds(work))
        return median(times)

    return measure


def on_gpu(repeats: int) -> Timer:
    """Median seconds of a call between two events on the device.

    A gigabyte is written before each call: it empties the caches, and its time lets the host launch all that the
    call consists of, so that what is timed is the device's work and not the launches.
    """
    flood = torch.empty(1 << 30, dtype=torch.int8, device="cuda")

    def measure(work: Callable[[], object], reset: Callable[[], object]) -> float:
        times = []
        for repeat in range(repeats + 3):  # the first ones compile and warm up
            reset()
            flood.zero_()
            flood.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                times.append(start.elapsed_time(stop) * 1e-3)
        return median(times)

    return measure


if __name__ == "__main__":
    sys.exit(main())
