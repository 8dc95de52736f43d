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
    slots: Array,
    contexts: Array,
    behind: Array,
    limits: Array,
    sittings: Array,
) -> tuple[int, int, int]:
    """`native_gate.decide`."""
    return decide(  # type: ignore[no-any-return]
        judged,
        changed,
        rested,
        row_cap,
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
        reals(desk, d.MEMORY),
        reals2(desk, d.BASE),
        reals2(desk, d.DRIFT),
        reals(desk, d.CURVE),
        reals(desk, d.RATES),
        limits,
        sittings,
    )


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
    conditional: Array,
    logits: Array,
    survival: Array,
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
        conditional,
        logits,
        survival,
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
    conditional: Array,
    logits: Array,
    survival: Array,
    work: Array,
    rule: int,
    mode: int,
    draft_tokens: int,
    threshold: float,
    tokens: float,
    past: Array,
    past_blocks: int,
    gains: Array,
    chosen: Array,
) -> int:
    """`survive`, then `native_lengths.choose` -> why it stopped."""
    survive(desk, confidence, slots, contexts, limits, everybodys, prefill, copied, conditional, logits, survival, work)
    memory = reals(desk, d.MEMORY)
    return choose(  # type: ignore[no-any-return]
        rule,
        mode,
        draft_tokens,
        threshold,
        conditional,
        survival,
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
def take_in(
    desk: Array, slots: Array, bands: Array, logits: Array, survival: Array, verified: Array, kept: Array
) -> None:
    """What became of blocks: `native_reliability.teach` and `native_blocks.saw`."""
    teach(
        bands,
        logits,
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
        survival,
        verified,
        kept,
        wholes2(desk, d.WHOLE),
        reals2(desk, d.REAL),
        reals3(desk, d.CURVES),
        reals3(desk, d.CLASSES),
        wholes(desk, d.CLASS_COUNT),
        reals4(desk, d.GALLERY),
        wholes2(desk, d.TALLY),
        reals(desk, d.RATIOS),
        reals(desk, d.MEMORY),
    )
