"""What deciding costs beside the rounds it decides, how it grows with requests, and whether its forecasts hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from statistics import fmean
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.schedule.cost import CostTable, LiveCost
from engine.schedule.planner import Planner
from engine.schedule.policies import make_policy
from engine.schedule.record import RoundRecord
from engine.stopwatch import Stopwatch
from engine.types import DraftBlock, EndConditions, Phase, PlanRow, Request, Sampling, Sequence, StepPlan, Verification
from engine.verify import Verdict
from tests.bench.decoding import make_engine
from tests.bench.measure import EMBEDDED, emit, median, say

STEPS = ("choose_drafting", "choose_lengths", "planner.learn")
PLANNING = ("plan",)
BLOCK = 7
_NOTHING: Any = None  # of a round that no model ran


def deciding(threads: int, rounds: int, steady_s: float) -> None:
    """Shares of real rounds at 1, 8 and 64 requests; the planner alone up to 4,096; forecasts over `steady_s`."""
    prompts = [prompt[-48:] for prompt in EMBEDDED.encode(EMBEDDED.heldout("code")) if len(prompt) >= 48]
    engine = make_engine("auto", threads)
    for policy in ("plain", "causal", "auto"):
        engine.update_policy({"policy": policy})
        for requests in (1, 8, 64):
            say(f"deciding, {policy}, {requests} request(s)")
            emit(name="deciding_share", policy=policy, requests=requests, **share(engine, prompts, requests, rounds))
    for policy in ("causal", "auto"):
        say(f"deciding alone, {policy}")
        for requests in (1, 16, 64, 256, 1024, 4096):
            emit(name="deciding_alone", policy=policy, requests=requests, **alone(policy, requests))
    prompts = [
        prompt[-48:] for prompt in EMBEDDED.encode(EMBEDDED.heldout("arithmetic")) if len(prompt) >= 16
    ]  # drafting pays here
    for requests in (1, 8):
        say(f"forecasts over {steady_s:g} s, {requests} request(s)")
        emit(name="forecasts", requests=requests, **forecasts(engine, prompts, requests, steady_s))


def share(engine: Engine, prompts: list[list[int]], requests: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a decode round, of what is decided in it (who drafts, lengths, what it taught), and its share;
    and of the rest of its plan (pages, rows), which plain decoding needs as well."""
    for index in range(requests):
        prompt = tuple(prompts[index % len(prompts)])
        engine.submit(Request(str(index), prompt, EndConditions(2 * BLOCK * rounds), Sampling()))
    while engine.waiting or any(s.phase is not Phase.DECODE for s in engine.running):
        engine.step()
    spent, planning = [0.0], [0.0]
    undo = _watch(engine, STEPS, spent), _watch(engine, PLANNING, planning)
    totals, decided, planned = [], [], []
    for _ in range(rounds):
        if len(engine.running) < requests:
            break
        spent[0], planning[0], start = 0.0, 0.0, time.perf_counter()
        engine.step()
        totals.append(time.perf_counter() - start)
        decided.append(spent[0])
        planned.append(planning[0])
    for each in undo:
        each()
    drafted = sum(r.drafted > 0 for record in engine.history.last(len(totals)) for r in record.requests)
    _empty(engine)
    return {
        "rounds": len(totals),
        "round_ms": 1e3 * median(totals),
        "deciding_ms": 1e3 * median(decided),
        "planning_ms": 1e3 * median(planned),
        "share": median(decided) / median(totals),
        "drafting_share": drafted / max(requests * len(totals), 1),
    }


def _watch(engine: Engine, steps: tuple[str, ...], spent: list[float]) -> Callable[[], None]:
    """Add up the seconds of the scheduler's `steps` into `spent`; returns what undoes it."""
    wrapped: list[tuple[Any, str]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            spent[0] += time.perf_counter() - start
            return result

        return run

    for path in steps:
        owner: Any = engine.scheduler
        *parts, method = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, method, timed(getattr(owner, method)))
        wrapped.append((owner, method))

    def undo() -> None:
        for owner, method in wrapped:
            delattr(owner, method)

    return undo


def _empty(engine: Engine) -> None:
    for sequence in [*engine.running, *engine.waiting]:
        engine.cancel(sequence.request.request_id)


def alone(policy: str, requests: int, rounds: int = 60) -> dict[str, float]:
    """Processor microseconds of a decision about `requests` blocks of 7 tokens, and beside n log n of candidates."""
    rows = (1 + BLOCK) * requests
    planner = Planner(LiveCost(_drafts_pay(rows), rows), BLOCK, True)
    lengths_by = make_policy(EngineConfig(model="none", policy=policy))
    sequences = [_sequence(index) for index in range(requests)]
    generator = torch.Generator().manual_seed(0)
    took: list[list[float]] = []
    for _ in range(rounds):
        marks = [time.thread_time()]
        places = planner.who_drafts(sequences, BLOCK, 0, lengths_by)
        marks.append(time.thread_time())
        shape = (len(places), max(planner.length, 1))
        drafting = tuple(sequences[place] for place in places)
        tokens, confidence = torch.zeros(shape, dtype=torch.int64), torch.rand(shape, generator=generator)
        block = DraftBlock(drafting, tokens, 0.5 + confidence / 2, None, None) if places else None
        marks.append(time.thread_time())
        lengths = dict(zip(map(id, drafting), planner.lengths(block, lengths_by), strict=True))
        marks.append(time.thread_time())
        plan = StepPlan(tuple(_row(sequence, lengths.get(id(sequence)), shape[1]) for sequence in sequences))
        accepted = tuple(row.draft_length // 2 for row in plan.rows)
        nothing = (_NOTHING,) * requests
        verdict = Verdict(accepted, nothing, None, _NOTHING, nothing, nothing)
        watch = Stopwatch(lambda at=marks[0]: at)
        marks.append(time.thread_time())
        finished = planner.learn(plan, block, verdict, 0, len(places), watch)
        marks.append(time.thread_time())
        finished.record()
        marks.append(time.thread_time())
        took.append([marks[1] - marks[0], marks[3] - marks[2], marks[5] - marks[4], marks[6] - marks[5]])
    # Means: who drafts is decided once in several rounds.
    who, how_much, learn, record = (1e6 * fmean(values) for values in zip(*took[rounds // 4 :], strict=True))
    candidates = requests * BLOCK
    return {
        "candidates": candidates,
        "who_us": who,
        "lengths_us": how_much,
        "learn_us": learn,
        "record_us": record,  # only for those who watch
        "ns_per_n_log_n": 1e3 * (who + how_much + learn) / (candidates * math.log2(candidates)),
    }


def _drafts_pay(rows: int) -> CostTable:
    """Rows that are nearly free, as where weights are read from memory."""
    top = float(rows)
    return CostTable(
        verify=((1.0, 20e-3), (top, 40e-3)),
        draft=((1.0, 2e-3), (top, 4e-3)),
        absorb=((1.0, 2e-4), (top, 1e-3)),
        draft_slots=0.3,
    )


def _sequence(number: int) -> Sequence:
    request = Request(str(number), (0,) * 64, EndConditions(10_000), Sampling())
    sequence = Sequence(request, 0, Verification.REJECTION, [0] * 64, number, Phase.DECODE)
    sequence.prompt_length = 64
    sequence.kv_length = sequence.absorbed = 63
    return sequence


def _row(sequence: Sequence, length: int | None, slots: int) -> PlanRow:
    verified = length or 0
    return PlanRow(sequence, sequence.kv_length, 1 + verified, verified, True, 0 if length is None else slots)


def forecasts(engine: Engine, prompts: list[list[int]], requests: int, steady_s: float) -> dict[str, float | None]:
    """Predicted against actual accepts and round times over steady load; every other request samples."""
    numbers = count()
    records: list[RoundRecord] = []
    until: float | None = None
    engine.history.observer = lambda finished: records.append(finished.record())
    while until is None or time.perf_counter() < until:
        while len(engine.running) + len(engine.waiting) < requests:
            number = next(numbers)
            sampling = Sampling(temperature=float(number % 2))
            engine.submit(Request(f"f{number}", tuple(prompts[number % len(prompts)]), EndConditions(200), sampling))
        engine.step()
        if until is None and len(records) >= 400:  # what was learned under other loads has faded
            records.clear()
            until = time.perf_counter() + steady_s
    engine.history.observer = None
    _empty(engine)
    decoding = [record for record in records if record.requests and not record.prefill_rows]
    predicted, accepted = sum(r.predicted_accepts for r in records), sum(r.accepted for r in records)
    return {
        "rounds": len(records),
        "accepted": accepted,
        "verified": sum(r.verified for r in records),
        "accepts_error": predicted / accepted - 1 if accepted else None,
        "round_s_error": sum(r.predicted_s for r in records) / sum(r.measured_s for r in records) - 1,
        "round_error_p50": median([abs(r.predicted_s / r.measured_s - 1) for r in decoding]),
    }
