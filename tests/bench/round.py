"""`make bench-round`: a round's time by stage beside the floor of its memory traffic and arithmetic, as JSON lines.

    make bench-round                                          Qwen3-4B, 8B and 14B shapes on a GPU, random weights
    make bench-round ARGS="--models 8b --requests 1 8 --mode coupled"
    make bench-round ARGS=--cpu                               the embedded model's shapes on the CPU

`--accept` gives the chance that a drafted token is kept if all before it were, slot by slot (the last one repeats).
Stages are timed alone; `round_us` is their sum, and `wall_us` is what one round after the other takes with
the host's launches. On a CPU the sequential head remembers recent tokens' biases, and caches hold small models.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

import torch

from kernels.threads import set_threads
from tests.bench.kernels import Timer, ceilings, machine, nothing, on_cpu, on_gpu
from tests.bench.measure import emit, median, say, seconds
from tests.bench.model import QWEN3, Depth, Model, Round, embedded_model, qwen3
from tests.bench.registry import Sizes
from tests.bench.sampling_ops import MODES

NO_GPU = "bench-round: no GPU here, so there is nothing to time; ARGS=--cpu times the embedded model's shapes"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.round", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the embedded model's shapes on the CPU")
    parser.add_argument("--models", nargs="+", choices=sorted(QWEN3), default=list(QWEN3))
    parser.add_argument("--requests", nargs="+", type=int)
    parser.add_argument("--context", type=int, help="tokens before the round")
    parser.add_argument("--accept", nargs="+", type=float, default=[0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76])
    parser.add_argument("--mode", choices=sorted(MODES), default="greedy")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="with --cpu")
    options = parser.parse_args()
    if not all(0 <= chance <= 1 for chance in options.accept):
        parser.error("--accept takes chances from 0 to 1")
    if not options.cpu and not torch.cuda.is_available():
        say(NO_GPU)
        return 1
    if options.cpu:
        set_threads(options.threads)
        torch.set_num_threads(options.threads)
    timer = on_cpu(options.repeats) if options.cpu else on_gpu(options.repeats)
    for name in ["embedded"] if options.cpu else options.models:
        sizes, depth = embedded_model() if options.cpu else qwen3(name, torch.device("cuda"))
        rates = ceilings(sizes, timer)
        machine(sizes, *rates)
        model = Model(sizes, depth)
        length = options.context or sizes.contexts[0]
        for requests in options.requests or sizes.requests:
            if not fits(sizes, depth, requests, length):
                say(f"{name}: no memory for {requests} requests of {length} tokens")
                continue
            accepted = profile(options.accept, sizes.block, requests)
            found = measure(Round(model, length, accepted, options.mode), timer, rates, options.repeats)
            emit(
                name="round", model=name, mode=options.mode, context=length, accepted=sum(accepted) / requests, **found
            )
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def fits(sizes: Sizes, depth: Depth, requests: int, length: int) -> bool:
    """Whether a GPU has room for caches and logits."""
    if sizes.device.type != "cuda":
        return True
    layers, each = depth.layers + depth.draft_layers, sizes.block + 1
    logits = 6 * 4 * requests * each * sizes.vocabulary
    return layers * sizes.kv_bytes(requests * (length + 2 * each + 32)) + logits < 0.9 * torch.cuda.mem_get_info()[0]


def profile(chances: Sequence[float], block: int, requests: int) -> list[int]:
    """Accepted lengths whose shares among the requests are those of the chances, as near as their number allows."""
    survival, alive = [], 1.0
    for slot in range(block):
        alive *= chances[min(slot, len(chances) - 1)]
        survival.append(alive)
    return [sum((i + 0.5) / requests < share for share in survival) for i in range(requests)]


def measure(work: Round, timer: Timer, rates: tuple[float, float], repeats: int) -> dict[str, object]:
    """Microseconds by stage and of their floors; tokens a second of a round and of plain decoding."""
    stages = work.stages()
    took = {name: 1e6 * timer(stage.run, stage.reset or nothing) for name, stage in stages.items()}
    floor = {name: 1e6 * max(stage.bytes / rates[0], stage.flops / rates[1]) for name, stage in stages.items()}
    plain, plain_floor = took.pop("plain"), floor.pop("plain")
    tokens = len(work.kept)
    total = sum(took.values())
    return {
        "requests": work.requests,
        "stages_us": {name: round(value, 1) for name, value in took.items()},
        "floors_us": {name: round(value, 1) for name, value in floor.items()},
        "round_us": total,
        "floor_us": sum(floor.values()),
        "wall_us": wall(work, repeats),
        "head_share": took["head"] / total,
        "tokens_s": 1e6 * tokens / total,
        "plain_us": plain,
        "plain_floor_us": plain_floor,
        "plain_tokens_s": 1e6 * work.requests / plain,
    }


def wall(work: Round, repeats: int) -> float:
    """Median microseconds of rounds in a row, the host waiting at the end of each."""
    stages = [stage for name, stage in work.stages().items() if name != "plain"]
    gpu = work.model.sizes.device.type == "cuda"

    def whole() -> None:
        for stage in stages:
            stage.run()
        if gpu:
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats):
        for stage in stages:
            if stage.reset:
                stage.reset()
        times.append(seconds(whole))
    return 1e6 * median(times)


if __name__ == "__main__":
    sys.exit(main())
