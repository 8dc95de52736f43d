"""The cost table that fits measured rounds: one curve by rows, and what requests, drafts and context add to it.

Every shape says something of all of these, so they are found together, by least squares of relative errors. Shapes
that nobody measured lie on the curve.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass

import numpy as np

from engine.schedule.cost import CostTable, Knots, increasing, interpolate, median
from engine.schedule.record import RoundRecord

Array = np.ndarray
SHORT_BLOCK = -2
STAIRS = 48  # rows up to which matrix tiles are reckoned with: more rows hide them
STEEP = 0.8  # of the way to the next shape is the stair
# By so many spreads of its own rounds, and errors of a typical shape, must one differ from the curve of all to be
# believed: shapes are measured at different times, in different moods of the machine. So much is enough in any case.
DOUBT, ERRORS, ENOUGH = 3.0, 2.0, 0.1
_REWEIGHTS, _OUTLYING = 5, 0.03  # relative error beyond which a shape counts less and less


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured round."""

    requests: int
    length: int  # ℓ, −1 for a round without a draft, SHORT_BLOCK for one in which one slot a block is drafted
    context: int  # of each request
    record: RoundRecord


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
    flat = {key: seconds for key, seconds in verify.items() if key[2] == short}
    joint = _JointFit(flat, rows, tile)
    request_s, drafted_s = joint.request_s, joint.drafted_s
    noise = _spread(cells.values())
    # Where stairs are tiles, it is known where they are: in the curve of all.
    doubtful = math.inf if tile else min(max(DOUBT * noise, ERRORS * joint.error), ENOUGH)
    verify = {key: seconds - (drafted_s if key[1] > 0 else 0.0) for key, seconds in verify.items()}
    knots = knots_through(
        [(float(rows[key]), verify[key] - request_s * (key[0] - 1)) for key in flat], doubtful, joint.rows_s
    )
    knots = _with_stairs(knots, tile)
    context_s, row_context_s = _context(verify, short, block_size)
    drafts = {key: typical([r.draft_s for r in records]) for key, records in cells.items() if key[1] > 0}
    draft = knots_through([(float(key[0]), seconds) for key, seconds in drafts.items() if key[2] == short], noise)
    absorb = knots_through(
        [(float(r.tokens), r.absorb_s) for key, records in cells.items() if key[1] > 0 for r in _middle(records)],
        noise,
    )
    long_drafts = [key for key in drafts if key[2] > short and (*key[:2], short) in drafts]
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


class _JointFit:
    """Seconds of plain and of drafted rounds as a sum of what rows, requests and drafts take, none of it negative.

    Args:
        seconds: by (requests, length, context), all of one context; rows: of each.
        tile: rows that the target multiplies at once; 0 where that makes no stairs.
    """

    def __init__(self, seconds: dict[tuple[int, int, int], float], rows: dict[tuple[int, int, int], int], tile: int):
        most = max(rows[key] for key in seconds)
        bends = {2**n for n in range(most.bit_length())} | {most}
        bends |= {full + more for full in range(tile, STAIRS + 1, tile) for more in (0, 1)} if tile else set()
        self._bends = sorted(float(x) for x in bends if x <= most)
        parts = np.array([[*self._hats(float(rows[key])), float(key[0] - 1), float(key[1] > 0)] for key in seconds])
        times = np.array(list(seconds.values()))
        weights = 1 / times
        for _ in range(_REWEIGHTS):
            found = _not_negative(parts * weights[:, None], times * weights)
            error = np.abs(parts @ found / times - 1)
            weights = np.sqrt(np.minimum(1.0, _OUTLYING / np.maximum(error, _OUTLYING))) / times
        self._steps = found[:-2]
        self.error = float(np.median(np.abs(parts @ found / times - 1)))  # relative, of a typical shape
        self.request_s, self.drafted_s = float(found[-2]), float(found[-1])

    def _hats(self, x: float) -> list[float]:
        """The share of each stretch between bends that lies below x; the first stands for what every round takes."""
        low, high = self._bends[:-1], self._bends[1:]
        return [1.0, *(min(max((x - a) / (b - a), 0.0), 1.0) for a, b in zip(low, high, strict=True))]

    def rows_s(self, rows: float) -> float:
        return float(np.dot(self._steps, self._hats(rows)))


def _not_negative(parts: Array, wanted: Array) -> Array:
    """Least squares without negative parts: what would be one is left out."""
    left, found = list(range(parts.shape[1])), np.zeros(parts.shape[1])
    while left:
        values = np.linalg.lstsq(parts[:, left], wanted, rcond=None)[0]
        if values.min() >= 0:
            found[left] = values
            break
        del left[int(values.argmin())]
    return found


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


def knots_through(
    points: Iterable[tuple[float, float]], noise: float, smooth: Callable[[float], float] | None = None
) -> Knots:
    """Increasing knots through measured points; a stair counts only where it stands out of the noise.

    Where the increasing curve is closer to a smooth one than to be told from it, that is taken: chance would otherwise
    make stairs that a scheduler climbs.

    Args:
        noise: relative distance that is none.
        smooth: seconds by x; by default a straight line through the points (Theil–Sen).
    """
    points = sorted(points)
    curve = increasing(points)
    if len(curve) < 3:
        return curve
    if smooth is None:
        slopes = [(d - b) / (c - a) for i, (a, b) in enumerate(points) for c, d in points[i + 1 :] if c > a]
        slope = max(median(slopes), 0.0)
        start = median([y - slope * x for x, y in points])
        line = {x: max(start + slope * x, 0.0) for x, _ in curve}
    else:
        line = {x: smooth(x) for x, _ in curve}
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
