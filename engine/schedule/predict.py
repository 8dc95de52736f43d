"""Predicts a measured load sweep: the same requests through the simulator, on costs measured at the servers' start.

Reads what `make bench-load` leaves: points.jsonl (one line an arm and concurrency) and profiles.json (cost tables,
recorded blocks, requests). Of the measured speeds nothing flows into the first prediction but the processor time of
server and client. The second stands on the same tables, as much slower as the servers had come to expect their rounds
by then: a table is measured in seconds, beside nobody, and a sweep takes minutes on a machine that others use, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from engine.schedule.acceptance import Acceptance, Block, Trace
from engine.schedule.cost import CostTable, Work
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
        stretches: by concurrency, `stretch` of the arms' rounds, their median; {} of sweeps that have not noted it.
        cores: of the machine, shared by engine, server and client.
    """

    points: list[dict[str, Any]]
    requests: list[tuple[int, int]]
    arms: dict[str, Arm]
    tables: dict[str, CostTable]
    traces: dict[str, tuple[Trace, ...]]
    between_s: dict[int, float]
    cores: int
    stretches: dict[int, float] = field(default_factory=dict)


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
            stretches={int(name): factor for name, factor in content.get("stretches", {}).items()},
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
        concurrency, measured = point["concurrency"], point["tokens_per_s"]
        costs = sweep.tables[arm.draft]
        outcome = _simulate(sweep, arm, concurrency, costs, sweep.between_s.get(concurrency, 0.0))
        predicted = 1 / (1 / outcome.steady_tokens_per_s + shared_s(point, sweep.cores))
        corrected = {}
        if (factor := sweep.stretches.get(concurrency)) is not None:
            # What passes between rounds, and what server and client take, is in those rounds already.
            then = _simulate(sweep, arm, concurrency, costs.scaled(factor), 0.0).steady_tokens_per_s
            corrected = {"predicted_as_corrected": then, "ratio_as_corrected": then / measured}
        yield {
            "arm": point["arm"],
            "concurrency": concurrency,
            "measured": measured,
            "predicted": predicted,
            "ratio": predicted / measured,
            **corrected,
            "engine_alone": outcome.steady_tokens_per_s,
            "measured_accepted_length": point["mean_accepted_length"],
            "predicted_accepted_length": outcome.mean_accepted_length,
            "measured_verify_budget": point["mean_verify_budget"],
            "predicted_verify_budget": outcome.verified / max(outcome.rounds, 1),
        }


def stretch(records: Iterable[Mapping[str, Any]], table: CostTable, block_size: int) -> float | None:
    """How many times as long as the table has them a server had come to expect its rounds, those without prompts.

    Expectations stand on past rounds alone (`LiveCost`). None where there are no such rounds.

    Args:
        records: RoundRecord.as_dict.
        block_size: γ, at least 1.
    """
    expected_s = table_s = 0.0
    for record in records:
        requests = record["requests"]
        if requests and not record["prefill_rows"]:
            expected_s += record["predicted_s"]
            table_s += table.seconds(_work(requests, block_size))
    return expected_s / table_s if table_s else None


def _work(requests: list[dict[str, Any]], block_size: int) -> Work:
    """What such a round ran; what had waited for the drafter is not in its record."""
    drafting = [r for r in requests if r["drafted"] and r["sitting"] != "lookup"]
    verified = sum(r["verified"] for r in requests)
    return Work(
        requests=len(requests),
        rows=len(requests) + verified,
        context=sum(r["context"] for r in requests),
        row_context=sum(r["verified"] * r["context"] for r in requests),
        drafting=len(drafting),
        draft_context=sum(r["context"] for r in drafting),
        absorbed=sum(1 + r["accepted"] for r in drafting),
        draft_share=max((r["drafted"] for r in drafting), default=block_size) / block_size,
    )


def _simulate(sweep: Sweep, arm: Arm, concurrency: int, costs: CostTable, between_s: float) -> Outcome:
    profiles: tuple[Acceptance | Trace, ...] = sweep.traces.get(arm.draft) or (Acceptance((0.5,)),)
    count = 3 * concurrency + max(2 * concurrency, 24)
    arrivals = [
        Arrival(0.0, *sweep.requests[number % len(sweep.requests)], acceptance=number % len(profiles))
        for number in range(count)
    ]
    simulator = Simulator(
        costs,
        profiles,
        arm.policy,
        arm.draft_tokens,
        max_running=concurrency,
        between_s=between_s,
    )
    return simulator.run(arrivals)


def shared_s(point: Mapping[str, Any], cores: int) -> float:
    """Seconds that server and client take from the engine for each token, where they share its cores.

    What they compute displaces the engine only where it would have run, and a displaced core is one of several.
    """
    others = (point.get("front_cores", 0.0) + point.get("client_cores", 0.0)) / point["tokens_per_s"]
    engine = min(point.get("engine_cores", 0.0) / cores, 1.0)
    return float(others * engine / cores)


def table(lines: list[dict[str, Any]]) -> str:
    """For people."""
    head = (
        f"{'arm':18s}{'at once':>8s}{'measured':>10s}{'predicted':>10s}{'ratio':>7s}{'as corrected':>14s}"
        "   accepted length, verify budget"
    )
    rows = [
        f"{line['arm']:18s}{line['concurrency']:8d}{line['measured']:10.0f}{line['predicted']:10.0f}{line['ratio']:7.2f}"
        f"{line.get('ratio_as_corrected', math.nan):14.2f}"
        f"   {line['measured_accepted_length']:.2f} → {line['predicted_accepted_length']:.2f},"
        f" {line['measured_verify_budget']:.2f} → {line['predicted_verify_budget']:.2f}"
        for line in lines
    ]
    found = [_within([line["ratio"] for line in lines])]
    if corrected := [line["ratio_as_corrected"] for line in lines if "ratio_as_corrected" in line]:
        found.append(f"{_within(corrected)} by the tables as corrected by then")
    return "\n".join([head, *rows, "; ".join(found)])


def _within(ratios: list[float]) -> str:
    return f"{sum(abs(ratio - 1) <= WITHIN for ratio in ratios)} of {len(ratios)} within {WITHIN:.0%}"
