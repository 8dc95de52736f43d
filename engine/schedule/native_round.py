"""A round's three decisions as calls from Python: who drafts, how much is verified, and what the round has taught.

What they stand on lies on a desk (`native_desk`); what is new in a round is handed over.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule import native_desk as d
from engine.schedule.jit import entry
from engine.schedule.native_blocks import saw
from engine.schedule.native_certainty import learn
from engine.schedule.native_desk import reals, reals2, reals3, reals4, wholes, wholes2
from engine.schedule.native_gate import decide
from engine.schedule.native_lengths import choose
from engine.schedule.native_reliability import teach
from engine.schedule.native_survival import survivals

Array = np.ndarray


@entry
def who_drafts(
    desk: Array,
    judged: bool,
    changed: bool,
    rested: int,
    row_cap: int,
    load: int,
    slots: Array,
    known: Array,
    limits: Array,
    sittings: Array,
) -> tuple[int, int, int, int]:
    """`native_gate.decide`, and the place of who had better begin again, −1 for nobody.

    Args:
        known: [2 R] of the decoding requests `contexts`, then what they are `behind`.
    """
    count = slots.shape[0]
    contexts, behind = known[:count], known[count:]
    memory = reals(desk, d.MEMORY)
    drafting, length, wait = decide(
        judged,
        changed,
        rested,
        row_cap,
        load,
        slots,
        contexts,
        behind,
        wholes2(desk, d.WHOLE),
        reals2(desk, d.REAL),
        reals3(desk, d.CURVES),
        reals3(desk, d.CLASSES),
        wholes(desk, d.CLASS_COUNT),
        reals4(desk, d.GALLERY),
        wholes2(desk, d.TALLY),
        memory,
        reals2(desk, d.BASE),
        reals2(desk, d.DRIFT),
        reals(desk, d.CURVE),
        reals(desk, d.RATES),
        limits,
        sittings,
    )
    return drafting, length, wait, int(memory[b.RETURNS])


@entry
def survive(
    desk: Array,
    confidence: Array,
    slots: Array,
    contexts: Array,
    limits: Array,
    everybodys: Array,
    prefill: int,
    copied: int,
    curves: Array,
    work: Array,
) -> None:
    """`native_survival.survivals`; `copied` rows are verified besides, whatever is chosen."""
    survivals(
        confidence,
        slots,
        contexts,
        limits,
        everybodys,
        prefill,
        wholes2(desk, d.WHOLE),
        reals2(desk, d.REAL),
        wholes(desk, d.KINDS),
        reals3(desk, d.AFFINE),
        reals3(desk, d.MAPS),
        reals3(desk, d.LINES),
        curves[0],
        curves[1],
        curves[2],
        work,
    )
    work[c.ROWS] += copied


@entry
def lengths(
    desk: Array,
    confidence: Array,
    slots: Array,
    contexts: Array,
    limits: Array,
    everybodys: Array,
    prefill: int,
    copied: int,
    curves: Array,
    rule: int,
    mode: int,
    draft_tokens: int,
    threshold: float,
    tokens: float,
    past: Array,
    past_blocks: int,
    gains: Array,
    chosen: Array,
) -> tuple[int, float]:
    """`survive`, then `native_lengths.choose` -> why it stopped, and the context of those that draft."""
    work = np.empty(c.WORK)
    survive(desk, confidence, slots, contexts, limits, everybodys, prefill, copied, curves, work)
    context = work[c.DRAFT_CONTEXT]
    memory = reals(desk, d.MEMORY)
    stop = choose(
        rule,
        mode,
        draft_tokens,
        threshold,
        curves[0],
        curves[2],
        slots,
        limits,
        contexts,
        wholes2(desk, d.WHOLE),
        reals2(desk, d.REAL),
        reals2(desk, d.BASE),
        reals2(desk, d.DRIFT),
        reals(desk, d.CURVE),
        reals(desk, d.RATES),
        work,
        tokens,
        memory[b.PRICE],
        memory[b.DECAY],
        past,
        past_blocks,
        gains,
        chosen,
    )
    return stop, context


@entry
def observe(
    desk: Array, slots: Array, certainty: Array, work: Array, seconds: Array, renew: bool, check: bool
) -> float:
    """`native_certainty.learn`."""
    return learn(  # type: ignore[no-any-return]
        slots,
        certainty,
        reals2(desk, d.REAL),
        reals2(desk, d.BASE),
        reals2(desk, d.DRIFT),
        reals(desk, d.CURVE),
        reals(desk, d.RATES),
        work,
        seconds,
        renew,
        check,
    )


@entry
def take_in(desk: Array, slots: Array, curves: Array, verified: Array, kept: Array) -> None:
    """What became of blocks: `native_reliability.teach` and `native_blocks.saw`."""
    whole = wholes2(desk, d.WHOLE)
    bands = np.empty(slots.shape[0], np.int64)
    for i in range(slots.shape[0]):
        bands[i] = whole[slots[i], b.BAND]
    teach(
        bands,
        curves[1],
        verified,
        kept,
        reals3(desk, d.LINES),
        reals3(desk, d.CURVATURE),
        reals3(desk, d.FLOOR),
        reals3(desk, d.SUMS),
        wholes2(desk, d.CHECKED),
        wholes2(desk, d.KEPT),
    )
    saw(
        slots,
        curves[2],
        verified,
        kept,
        whole,
        reals2(desk, d.REAL),
        reals3(desk, d.CURVES),
        reals3(desk, d.CLASSES),
        wholes(desk, d.CLASS_COUNT),
        reals4(desk, d.GALLERY),
        wholes2(desk, d.TALLY),
        reals(desk, d.RATIOS),
        reals(desk, d.MEMORY),
    )
