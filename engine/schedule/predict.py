"""Predicts a measured load sweep: the same requests through the simulator, on costs measured at the servers' start.

Reads what `make bench-load` leaves: points.jsonl (one line an arm and concurrency) and profiles.json (cost tables,
recorded blocks, requests). Of the measured speeds nothing flows into a prediction but the processor time of server
and client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from engine.schedule.acceptance import Acceptance, Block, Trace
from engine.schedule.cost import CostTable
from engine.schedule.loads import Arrival
from engine.schedule.simulate import Outcome, Simulator
from engine.schedule.store import decode

WITHIN = 0.15


@dataclass(frozen=True, slots=True)
class Arm:
    """What a server was started with."""

    draft: str
    policy: str
    draft_tokens: int | None


@dataclass(frozen=True, slots=True)
class Sweep:
    """A measured sweep, and all that predicting it takes.

    Args:
        points: lines of points.jsonl.
        requests: (prompt, answer) in tokens, in the order in which users send them.
        between_s: by concurrency, what the engine's process does between two rounds.
        cores: of the machine, shared by engine, server and client.
    """

    points: list[dict[str, Any]]
    requests: list[tuple[int, int]]
    arms: dict[str, Arm]
    tables: dict[str, CostTable]
    traces: dict[str, tuple[Trace, ...]]
    between_s: dict[int, float]
    cores: int


def read(points: Path, profiles: Path) -> Sweep:
    """A sweep from its two files.

    Raises:
        LoadError: one is missing or damaged; names it.
    """
    try:
        lines = [json.loads(line) for line in points.read_text(encoding="utf-8").splitlines() if line.strip()]
        for line in lines:
            line["arm"], line["concurrency"], line["tokens_per_s"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{points} holds no lines of `make bench-load` ({error!r})") from error
    try:
        content = json.loads(profiles.read_text(encoding="utf-8"))
        return Sweep(
            points=lines,
            requests=[(prompt, tokens) for prompt, tokens in content["requests"]],
            arms={name: Arm(**arm) for name, arm in content["arms"].items()},
            tables={name: decode(table) for name, table in content["tables"].items()},
            traces={name: tuple(map(_trace, found)) for name, found in content["traces"].items()},
            between_s={int(name): seconds for name, seconds in content["between_s"].items()},
            cores=content["cores"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{profiles} holds no profiles of `make bench-load` ({error!r}); run it again") from error


def _trace(blocks: list[Any]) -> Trace:
    return Trace(tuple(Block(tuple(survival), accepted) for survival, accepted in blocks))


def predict(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """One line a point: measured, predicted, and predicted ÷ measured. Points without costs or blocks are left out."""
    for point in sweep.points:
        arm = sweep.arms.get(point["arm"])
        if arm is None or arm.draft not in sweep.tables or (arm.policy != "plain" and not sweep.traces.get(arm.draft)):
            continue
        concurrency = point["concurrency"]
        outcome = _simulate(sweep, arm, concurrency)
        predicted = 1 / (1 / outcome.steady_tokens_per_s + shared_s(point, sweep.cores))
        yield {
            "arm": point["arm"],
            "concurrency": concurrency,
            "measured": point["tokens_per_s"],
            "predicted": predicted,
            "ratio": predicted / point["tokens_per_s"],
            "engine_alone": outcome.steady_tokens_per_s,
            "measured_accepted_length": point["mean_accepted_length"],
            "predicted_accepted_length": outcome.mean_accepted_length,
            "measured_verify_budget": point["mean_verify_budget"],
            "predicted_verify_budget": outcome.verified / max(outcome.rounds, 1),
        }


def _simulate(sweep: Sweep, arm: Arm, concurrency: int) -> Outcome:
    profiles: tuple[Acceptance | Trace, ...] = sweep.traces.get(arm.draft) or (Acceptance((0.5,)),)
    count = 3 * concurrency + max(2 * concurrency, 24)
    arrivals = [
        Arrival(0.0, *sweep.requests[number % len(sweep.requests)], acceptance=number % len(profiles))
        for number in range(count)
    ]
    simulator = Simulator(
        sweep.tables[arm.draft],
        profiles,
        arm.policy,
        arm.draft_tokens,
        max_running=concurrency,
        between_s=sweep.between_s.get(concurrency, 0.0),
    )
    return simulator.run(arrivals)


def shared_s(point: Mapping[str, Any], cores: int) -> float:
    """Seconds that server and client take from the engine for each token, where they share its cores.

    What they compute displaces it only where it would have used every core, and then stands still for: threads that
    are not displaced wait for the one that is. How much of the time that is shows in its use of what they leave it.
    """
    others = point.get("front_cores", 0.0) + point.get("client_cores", 0.0)
    left = max(cores - others, 1e-9)
    used = cores * min(point.get("engine_cores", 0.0) / left, 1.0)
    together = 1.0 if cores == 1 else max(used - 1.0, 0.0) / (cores - 1)
    return float(others * together / point["tokens_per_s"])


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    head = (
        f"{'arm':18s}{'at once':>8s}{'measured':>10s}{'predicted':>10s}{'ratio':>7s}   accepted length, verify budget"
    )
    rows = [
        f"{line['arm']:18s}{line['concurrency']:8d}{line['measured']:10.0f}{line['predicted']:10.0f}{line['ratio']:7.2f}"
        f"   {line['measured_accepted_length']:.2f} → {line['predicted_accepted_length']:.2f},"
        f" {line['measured_verify_budget']:.2f} → {line['predicted_verify_budget']:.2f}"
        for line in lines
    ]
    good = sum(abs(line["ratio"] - 1) <= WITHIN for line in lines)
    return "\n".join([head, *rows, f"{good} of {len(lines)} within {WITHIN:.0%}"])
