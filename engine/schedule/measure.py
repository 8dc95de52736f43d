"""Measures the cost table on the engine that will serve: real rounds, its own kernels, host work included."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Row
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engine.device_rounds.rounds import paused
from engine.engine import Engine
from engine.schedule.cost import CostTable, Knots, increasing, interpolate, median
from engine.schedule.lengths import Candidate, Choice
from engine.schedule.policies import Round, StaticLengths
from engine.schedule.record import RoundRecord, Stop
from engine.types import EndConditions, Phase, Request, Sampling, SpeculationMode
from kernels.processor import may_use_tiles

SHORT = 24  # prompt tokens where context should not matter
LONG = 1024  # and where it should
ROUNDS = 3  # measured rounds a visit of a cell, after one that is thrown away
MOST_VISITS = 7
TILE, STAIRS = 16, 48  # rows of a matrix tile, and how far they are reckoned with: many rows hide them
STEEP = 0.8  # of the way to the next shape is the stair
FEW = (1, 2, 4)  # requests of the rounds that show what drafts take besides
SHORT_BLOCK = -2


class Forced:
    """Every block verified to the same length: what a measurement needs."""

    name = "measuring"
    rule = None

    def __init__(self) -> None:
        self.length = 0

    def choose(self, candidates: Row[Candidate], round_: Round) -> Choice:
        return Choice([min(self.length, c.limit) for c in candidates], Stop.RULE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured round."""

    requests: int
    length: int  # ℓ, −1 for a round without a draft, SHORT_BLOCK for one in which one slot a block is drafted
    context: int  # of each request
    record: RoundRecord


def measure(engine: Engine, budget_s: float) -> CostTable:
    """Run rounds of many shapes for about `budget_s` seconds and fit the table; the engine is left empty.

    Shapes are visited in turns, the cheap ones that everything rests on first, so that a short budget gives a coarse
    table and a disturbance hits all of them alike; each shape counts with its median.
    """
    assert not engine.has_work, "measuring needs the engine to itself"
    deadline = time.perf_counter() + budget_s
    samples: list[Sample] = []
    prefill: list[tuple[int, float]] = []
    with _measuring(engine) as forced:
        for visit in range(MOST_VISITS):
            for requests, context in _settings(engine):
                if visit and time.perf_counter() > deadline:
                    break
                if not _fits(engine, requests, context):
                    continue
                # The first visit always covers one request and the most; the rest only while there is time.
                if time.perf_counter() > deadline and (samples and requests > 1):
                    continue
                samples += _visit(engine, forced, requests, context, deadline, visit, prefill)
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
            for turn in range(ROUNDS + 1):
                engine.step()
                if turn:
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


def fit(samples: list[Sample], prefill: list[tuple[int, float]], block_size: int, tile: int = 0) -> CostTable:
    """Typical times of each shape, made into increasing knots; requests and context add what differences say.

    Args:
        tile: rows that the target multiplies at once; 0 where that makes no stairs.
    """
    cells: dict[tuple[int, int, int], list[RoundRecord]] = defaultdict(list)
    brief: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        if sample.length == SHORT_BLOCK:
            brief[sample.requests, sample.context].append(sample.record.draft_s)
            continue
        cells[sample.requests, sample.length, sample.context].append(sample.record)
    verify = {key: typical([r.verify_s for r in records]) for key, records in cells.items()}
    rows = {key: key[0] * (1 + max(key[1], 0)) for key in cells}
    short = min(context for _, _, context in cells)
    drafted_s = _drafted(verify, short, block_size)
    verify = {key: seconds - (drafted_s if key[1] > 0 else 0.0) for key, seconds in verify.items()}
    flat = {key: seconds for key, seconds in verify.items() if key[2] == short}
    # Two shapes with as many rows differ by their requests alone.
    slopes = [(flat[a] - flat[b]) / (a[0] - b[0]) for a in flat for b in flat if a[0] > b[0] and rows[a] == rows[b]]
    request_s = max(median(slopes), 0.0)
    noise = _spread(cells.values())
    knots = knots_through(
        [(float(rows[key]), seconds - request_s * (key[0] - 1)) for key, seconds in flat.items()], noise
    )
    knots = _with_stairs(knots, tile)
    context_s, row_context_s = _context(verify, short, block_size)
    drafts = {key: typical([r.draft_s for r in records]) for key, records in cells.items() if key[1] > 0}
    draft = knots_through([(float(key[0]), seconds) for key, seconds in drafts.items() if key[2] == short], noise)
    absorb = knots_through(
        [(float(r.tokens), r.absorb_s) for key, records in cells.items() if key[1] > 0 for r in _middle(records)],
        noise,
    )
    long_drafts = [key for key in drafts if key[2] > short]
    draft_context_s = max(
        median([(drafts[k] - drafts[k[0], k[1], short]) / (k[0] * (k[2] - short)) for k in long_drafts]), 0.0
    )
    # One slot a block against all of them, at as many requests.
    savings = [
        1 - typical(times) / drafts[n, block_size, context] for (n, context), times in brief.items() if block_size > 1
    ]
    draft_slots = min(max(median(savings) / (1 - 1 / max(block_size, 2)), 0.0), 1.0)
    return CostTable(
        verify=_thinned(knots),
        request_s=request_s,
        context_s=context_s,
        row_context_s=row_context_s,
        prefill_row=_prefill_row(knots, prefill),
        draft=draft or ((0.0, 0.0),),
        draft_context_s=draft_context_s,
        absorb=_thinned(absorb) or ((0.0, 0.0),),
        draft_slots=draft_slots,
        drafted_s=drafted_s,
    )


def _drafted(verify: dict[tuple[int, int, int], float], short: int, block_size: int) -> float:
    """What a round with drafts takes beside its rows: how much longer one of few requests with one draft token each is
    than one without, less what its rows take, by rounds of whole blocks."""
    found = []
    for requests in FEW:
        plain, one, whole = (verify.get((requests, length, short)) for length in (-1, 1, block_size))
        if plain is not None and one is not None and whole is not None and block_size > 1:
            found.append(one - plain - max((whole - one) / (block_size - 1), 0.0))
    return max(median(found), 0.0)


def _with_stairs(knots: Knots, tile: int) -> Knots:
    """With a knot for one row more than fills so many tiles: it begins another, and takes what the next shape does that
    was measured. Between shapes of whole blocks a straight line would hide that."""
    found = dict(knots)
    for full in range(tile, STAIRS + 1, tile) if tile else ():
        behind = [x for x, _ in knots if full < x <= full + tile // 2]
        if behind and full in found and full + 1 not in found:
            found[full + 1.0] = found[full] + (found[behind[0]] - found[full]) * STEEP
    return increasing(found.items())


def _middle(records: list[RoundRecord]) -> list[RoundRecord]:
    """The record of typical absorbing time."""
    return [sorted(records, key=lambda r: r.absorb_s)[len(records) // 4]]


def typical(seconds: Row[float]) -> float:
    """The lower quartile: what disturbs a round only ever makes it longer, and on a busy machine most are disturbed."""
    return float(np.quantile(seconds, 0.25)) if seconds else 0.0


def knots_through(points: Iterable[tuple[float, float]], noise: float) -> Knots:
    """Increasing knots through measured points; a stair counts only where it stands out of the noise.

    A straight line is fitted to the points (Theil–Sen). Where the increasing curve is closer to it than a
    shape's rounds are to each other, the line is taken: chance would otherwise make stairs that a scheduler climbs.

    Args:
        noise: relative spread of a shape's own rounds.
    """
    points = sorted(points)
    curve = increasing(points)
    if len(curve) < 3:
        return curve
    slopes = [(d - b) / (c - a) for i, (a, b) in enumerate(points) for c, d in points[i + 1 :] if c > a]
    slope = max(median(slopes), 0.0)
    start = median([y - slope * x for x, y in points])
    line = {x: max(start + slope * x, 0.0) for x, _ in curve}
    return increasing((x, line[x] if abs(y - line[x]) <= noise * line[x] else y) for x, y in curve)


def _spread(cells: Iterable[list[RoundRecord]]) -> float:
    """How far a shape's rounds typically lie apart, relative to its typical time."""
    times = [[record.verify_s for record in records] for records in cells]
    return median([median(t) / typical(t) - 1 for t in times if len(t) > 2])


def _context(verify: dict[tuple[int, int, int], float], short: int, block_size: int) -> tuple[float, float]:
    """Seconds that a token of context adds, for a request and for each of its drafted rows."""
    one = {key[1]: (seconds, key[2]) for key, seconds in verify.items() if key[2] > short and key[0] == 1}
    if -1 not in one or (1, -1, short) not in verify:
        return 0.0, 0.0
    plain, context = one[-1]
    span = context - short
    each = max((plain - verify[1, -1, short]) / span, 0.0)
    if block_size not in one:
        return each, 0.0
    drafted = (one[block_size][0] - verify[1, block_size, short]) / span
    return each, max((drafted - each) / block_size, 0.0)


def _prefill_row(knots: Knots, prefill: list[tuple[int, float]]) -> float:
    """A prompt row as a share of a decode row: it needs no logits."""
    shares = []
    for rows, seconds in prefill:
        if rows >= 16:
            low, high = 1.0, 2.0 * rows
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (middle, high) if interpolate(knots, middle) < seconds else (low, middle)
            shares.append(high / rows)
    return min(max(median(shares), 0.2), 1.5) if shares else 1.0


def _thinned(knots: Knots) -> Knots:
    """Without flat stretches' inner knots, which say nothing."""
    keep = [
        knot
        for i, knot in enumerate(knots)
        if i in (0, len(knots) - 1) or not knots[i - 1][1] == knot[1] == knots[i + 1][1]
    ]
    return tuple(keep)
