"""Measures the cost table on the engine that will serve: real rounds, its own kernels, host work included."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as Row
from contextlib import contextmanager

from engine.device_rounds.rounds import paused
from engine.engine import Engine
from engine.schedule.cost import CostTable
from engine.schedule.fit import SHORT_BLOCK, Sample, fit
from engine.schedule.lengths import Candidate, Choice
from engine.schedule.policies import Round, StaticLengths
from engine.schedule.record import Stop
from engine.types import EndConditions, Phase, Request, Sampling, SpeculationMode
from kernels.processor import may_use_tiles

SHORT = 24  # prompt tokens where context should not matter
LONG = 1024  # and where it should
ROUNDS = 3  # measured rounds a visit of a cell, after one that is thrown away
COLD = 3  # thrown away where drafting begins: what it needs is not in the caches yet
MOST_VISITS = 16
TILE = 16  # rows of a matrix tile


class Forced:
    """Every block verified to the same length: what a measurement needs."""

    name = "measuring"
    rule = None

    def __init__(self) -> None:
        self.length = 0

    def choose(self, candidates: Row[Candidate], round_: Round) -> Choice:
        return Choice([min(self.length, c.limit) for c in candidates], Stop.RULE)


def measure(engine: Engine, budget_s: float) -> CostTable:
    """Run rounds of many shapes for about `budget_s` seconds and fit the table; the engine is left empty.

    Every setting is visited once, those that everything rests on first, so that a short budget gives a coarse table;
    then always the one that has had least time so far: few requests, whose rounds are short and whose rows matter most,
    are seen often, and a disturbance hits all of them alike.
    """
    assert not engine.has_work, "measuring needs the engine to itself"
    deadline = time.perf_counter() + budget_s
    samples: list[Sample] = []
    prefill: list[tuple[int, float]] = []
    with _measuring(engine) as forced:
        settings = [setting for setting in _settings(engine) if _fits(engine, *setting)]
        visits, spent_s = dict.fromkeys(settings, 0), dict.fromkeys(settings, 0.0)
        while settings:
            new = [setting for setting in settings if not visits[setting]]
            began = time.perf_counter()
            if began > deadline:  # one request is measured in any case
                new = [(requests, context) for requests, context in new if not samples or requests == 1]
                if not new:
                    break
            chosen = new[0] if new else min(settings, key=spent_s.__getitem__)
            samples += _visit(engine, forced, *chosen, deadline, visits[chosen], prefill)
            spent_s[chosen] += time.perf_counter() - began
            visits[chosen] += 1
            if visits[chosen] == MOST_VISITS:
                settings.remove(chosen)
        engine.reset()
    if not samples:  # caches too small for any shape: the rounds to come must do
        return engine.scheduler.cost.table
    tile = TILE if engine.target.device.type == "cpu" and may_use_tiles() else 0
    return fit(samples, prefill, engine.scheduler.block_size, tile)


def _settings(engine: Engine) -> Iterator[tuple[int, int]]:
    """(requests, context) in the order of their worth."""
    most = engine.config.max_running
    yield 1, SHORT
    yield min(8, most), SHORT
    yield 1, min(LONG, engine.info.max_model_len * 3 // 4)
    yield most, SHORT
    for requests in (4, 2, 16, 32):
        if requests < most:
            yield requests, SHORT


def _fits(engine: Engine, requests: int, context: int) -> bool:
    """Whether so many sequences, and the tokens that they will gain, have room."""
    gained = (ROUNDS + 1) * (2 + engine.scheduler.block_size) ** 2
    tokens = context + min(gained, 256) + engine.scheduler.block_size + 2
    pages = -(-tokens // engine.info.page_size)
    return tokens < engine.info.max_model_len and requests * pages <= engine.pool.total


def _lengths(block_size: int, visit: int) -> list[int]:
    """−1 (no draft), then verified lengths, then a short block; the first visit takes only the ends."""
    if not block_size:
        return [-1]
    if visit == 0:
        return [-1, *sorted({1, block_size}), SHORT_BLOCK]
    return [-1, *range(1, block_size + 1), SHORT_BLOCK]


def _visit(
    engine: Engine,
    forced: Forced,
    requests: int,
    context: int,
    deadline: float,
    visit: int,
    prefill: list[tuple[int, float]],
) -> list[Sample]:
    """Run every length a few times with so many requests: plain rounds first, of requests that nobody follows; then, of
    others that are followed from their beginning, rounds with drafts. Who is to draft and was not followed would run
    once more from its beginning, amid what is measured."""
    found: list[Sample] = []
    one_slot = StaticLengths(SpeculationMode.FIXED, 1, 0.0)
    plain, drafted = [-1], [length for length in _lengths(engine.scheduler.block_size, visit) if length != -1]
    for lengths in (plain, drafted) if drafted else (plain,):
        engine.scheduler.policy, forced.length = None if lengths is plain else forced, 0
        _fill(engine, requests, context, visit, prefill if lengths is plain else [])
        for length in lengths:
            if found and visit and time.perf_counter() > deadline:
                break
            engine.scheduler.policy = None if length == -1 else one_slot if length == SHORT_BLOCK else forced
            forced.length = length
            thrown_away = COLD if lengths is drafted and length == lengths[0] else 1
            for turn in range(ROUNDS + thrown_away):
                engine.step()
                if turn >= thrown_away:
                    found.append(Sample(requests, length, context, engine.history.last(1)[0]))
        engine.reset()
    return found


def _fill(engine: Engine, requests: int, context: int, visit: int, prefill: list[tuple[int, float]]) -> None:
    """Submit so many requests, and run their prompts."""
    generator = random.Random(requests * 7919 + context + visit)
    vocabulary = engine.info.vocab_size
    for index in range(requests):
        prompt = tuple(generator.randrange(vocabulary) for _ in range(context))
        engine.submit(Request(f"measure-{index}", prompt, EndConditions(engine.info.max_model_len), Sampling()))
    while engine.waiting or any(s.phase is Phase.PREFILL for s in engine.running):
        engine.step()
        record = engine.history.last(1)[0]
        if not record.requests:
            prefill.append((record.prefill_rows, record.verify_s))


@contextmanager
def _measuring(engine: Engine) -> Iterator[Forced]:
    """The engine's own settings come back afterwards, and nothing of the measurement stays in its memory."""
    scheduler, cache = engine.scheduler, engine.cache
    policy, enabled, rounds = scheduler.policy, cache.enabled, engine.rounds
    cache.enabled = False
    try:
        with paused(engine.device_rounds):  # the table is of rounds that the host runs
            yield Forced()
    finally:
        engine.reset()
        scheduler.policy, cache.enabled, engine.rounds = policy, enabled, rounds
        engine.forget_rounds()
