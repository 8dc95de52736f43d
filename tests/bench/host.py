"""Where a round's time goes: native kernels, and the host's own work by stage of the round."""

from __future__ import annotations

import pkgutil
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from engine.engine import Engine
from engine.types import EndConditions, Phase, Request, Sampling
from tests.bench.decoding import make_engine
from tests.bench.measure import EMBEDDED, emit, median, say

# Every way from Python into native code that a round takes, and the one torch operator that moves more than indices.
NATIVE = (
    ("torch.Tensor", "index_select"),
    ("kernels.layer_run", "run"),
    ("kernels.matmul", "run"),
    ("kernels.context", "run"),
    ("kernels.embedding", "_gather"),
    ("kernels.rms_norm", "_norm_rows"),
    ("kernels.store_kv", "_store"),
    ("kernels.markov_sample", "run"),
    ("kernels.verify", "_verify"),
    ("kernels.draft_pass", "_draft"),
    ("kernels.target_pass", "_decide"),
    ("kernels.context_pass", "_absorb"),
)
STAGES = (  # name, path of the method from the engine
    ("decide", "scheduler.choose_drafting"),
    ("draft", "drafter.propose"),
    ("decide", "scheduler.choose_lengths"),
    ("plan", "scheduler.plan"),
    ("verify", "verifier.run"),
    ("absorb", "drafter.absorb"),
    ("commit", "committer.apply"),
    ("learn", "scheduler.planner.learn"),
)


class NativeClock:
    """Seconds spent in native code; wraps its entries for as long as it is used as a context."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> NativeClock:
        for module_name, name in NATIVE:
            module = pkgutil.resolve_name(module_name)
            function = getattr(module, name)
            self._before.append((module, name, function))
            setattr(module, name, self._timed(function))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, function in self._before:
            setattr(module, name, function)
        self._before.clear()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def host_time(threads: int, rounds: int) -> None:
    """Medians over decode rounds, plain and DSpark, 1, 8 and 64 requests."""
    prompts = [prompt[-48:] for prompt in EMBEDDED.encode(EMBEDDED.heldout("code")) if len(prompt) >= 48]
    for policy in ("plain", "fixed", "auto"):
        engine = make_engine(policy, threads)
        for count in (1, 8, 64):
            say(f"host time, {policy}, {count} request(s)")
            with NativeClock() as clock:
                emit(name="host_time", policy=policy, requests=count, **_measure(engine, prompts, count, rounds, clock))


def _measure(
    engine: Engine, prompts: list[list[int]], count: int, rounds: int, clock: NativeClock
) -> dict[str, float | dict[str, float]]:
    for index in range(count):
        request = Request(
            str(index), tuple(prompts[index % len(prompts)]), EndConditions(400), Sampling(temperature=0.0)
        )
        engine.submit(request)
    while engine.waiting or any(s.phase is not Phase.DECODE for s in engine.running):
        engine.step()
    host: dict[str, float] = defaultdict(float)
    undo = _wrap_stages(engine, clock, host)
    totals: list[float] = []
    natives: list[float] = []
    by_stage: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        if len(engine.running) < count:
            break
        host.clear()
        clock.seconds, start = 0.0, time.perf_counter()
        engine.step()
        totals.append(time.perf_counter() - start)
        natives.append(clock.seconds)
        for stage in dict(STAGES):
            by_stage[stage].append(host[stage])
        by_stage["rest"].append(totals[-1] - natives[-1] - sum(host.values()))
    undo()
    for sequence in list(engine.running):
        engine.cancel(sequence.request.request_id)
    return {
        "rounds": len(totals),
        "round_ms": 1e3 * median(totals),
        "native_ms": 1e3 * median(natives),
        "host_ms": 1e3 * median([total - native for total, native in zip(totals, natives, strict=True)]),
        "host_ms_by_stage": {stage: round(1e3 * median(values), 4) for stage, values in by_stage.items()},
    }


def _wrap_stages(engine: Engine, clock: NativeClock, host: dict[str, float]) -> Callable[[], None]:
    """Add up each stage's time outside native code; returns what takes the wrappers off."""
    wrapped: list[tuple[Any, str]] = []

    def wrap(owner: Any, method: str, stage: str) -> None:
        function = getattr(owner, method)

        def timed(*arguments: Any, **more: Any) -> Any:
            native, start = clock.seconds, time.perf_counter()
            result = function(*arguments, **more)
            host[stage] += time.perf_counter() - start - (clock.seconds - native)
            return result

        setattr(owner, method, timed)
        wrapped.append((owner, method))

    for stage, path in STAGES:
        owner: Any = engine
        *parts, method = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        if owner is not None:
            wrap(owner, method, stage)

    def undo() -> None:
        for owner, method in wrapped:
            delattr(owner, method)

    return undo
