"""A round's three decisions as calls from Python: who drafts, how much is verified, and what the round has taught.

What they stand on lies on a desk (`native_desk`), what is new in a round on its sheets (`native_sheet`): all of it is
handed over by its address.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_cost as c
from engine.schedule import native_desk as d
from engine.schedule import native_sheet as n
from engine.schedule.jit import entry
from engine.schedule.native_blocks import saw
from engine.schedule.native_certainty import learn
from engine.schedule.native_desk import desk_at, reals, reals2, reals3, reals4, wholes, wholes2
from engine.schedule.native_following import looked
from engine.schedule.native_gate import PROBE, decide
from engine.schedule.native_lengths import choose
from engine.schedule.native_reliability import teach
from engine.schedule.native_survival import survivals
from kernels.arrays import doubles_at

Array = np.ndarray

SURE = 0.8  # how near a round without drafts must come to what it was to take


@entry
def who_drafts(
    desk_address: int, sheet: int, count: int, judged: bool, changed: bool, rested: int, row_cap: int, load: int
) -> tuple[int, int, int, int, bool]:
    """`native_gate.decide`, the place of who had better begin again, −1 for nobody, and whether this is a check.

    Limits and sittings are written on the sheet.
    """
    desk = desk_at(desk_address)
    memory = reals(desk, d.MEMORY)
    drafting, length, wait = decide(
        judged,
        changed,
        rested,
        row_cap,
        load,
        n.whole_column(sheet, count, n.SLOT),
        n.whole_column(sheet, count, n.CONTEXT),
        n.whole_column(sheet, count, n.BEHIND),
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
        n.whole_column(sheet, count, n.LIMIT),
        n.whole_column(sheet, count, n.SITTING),
    )
    return drafting, length, wait, int(memory[b.RETURNS]), memory[b.CHECKING] > 0


@entry
def survive(
    desk_address: int, sheet: int, count: int, prefill: int, blocks: int, drafting: int, length: int, confidence: int
) -> None:
    """`native_survival.survivals` of blocks whose slots, contexts and limits stand on their sheet.

    Args:
        prefill: rows of prompts that the round runs.
        confidence: the address of [D, L] float32, 0 without any.
    """
    desk = desk_at(desk_address)
    curves = n.curves_of(blocks, drafting, length)
    survivals(
        n.confidences_at(confidence, drafting, length),
        n.block_column(blocks, drafting, n.SLOT),
        n.block_column(blocks, drafting, n.CONTEXT),
        n.block_column(blocks, drafting, n.BLOCK_LIMIT),
        n.whole_column(sheet, count, n.CONTEXT),
        prefill,
        wholes2(desk, d.WHOLE),
        reals2(desk, d.REAL),
        wholes(desk, d.KINDS),
        reals3(desk, d.AFFINE),
        reals3(desk, d.MAPS),
        reals3(desk, d.LINES),
        curves[n.CONDITIONAL],
        curves[n.LOGIT],
        curves[n.SURVIVAL],
        n.work_of(sheet),
    )


@entry
def judge_blocks(
    desk_address: int,
    sheet: int,
    count: int,
    prefill: int,
    copied: int,
    blocks: int,
    drafting: int,
    length: int,
    confidence: int,
) -> None:
    """`survive` for the blocks of those that draft by the sheet; and the round with ℓ = 0, onto it.

    Args:
        prefill, copied: rows of prompts and of copies that the round runs besides.
    """
    slots, contexts = n.whole_column(sheet, count, n.SLOT), n.whole_column(sheet, count, n.CONTEXT)
    limits, sittings = n.whole_column(sheet, count, n.LIMIT), n.whole_column(sheet, count, n.SITTING)
    own_slots, own_contexts = n.block_column(blocks, drafting, n.SLOT), n.block_column(blocks, drafting, n.CONTEXT)
    own_limits = n.block_column(blocks, drafting, n.BLOCK_LIMIT)
    row = 0
    for i in range(count):
        if sittings[i] <= PROBE:
            own_slots[row], own_contexts[row], own_limits[row] = slots[i], contexts[i], limits[i]
            row += 1
    survive(desk_address, sheet, count, prefill, blocks, drafting, length, confidence)
    n.work_of(sheet)[c.ROWS] += copied


@entry
def lengths(
    desk_address: int,
    sheet: int,
    count: int,
    prefill: int,
    copied: int,
    blocks: int,
    drafting: int,
    length: int,
    confidence: int,
    rule: int,
    mode: int,
    draft_tokens: int,
    threshold: float,
    past: int,
    past_gains: int,
    past_blocks: int,
    gains: int,
) -> int:
    """`judge_blocks`, then `native_lengths.choose` -> why it stopped. Lengths are written on the blocks' sheet.

    Args:
        past: the address of `past_gains` real numbers; gains: of [D · L], or 0.
    """
    judge_blocks(desk_address, sheet, count, prefill, copied, blocks, drafting, length, confidence)
    desk = desk_at(desk_address)
    memory, curves = reals(desk, d.MEMORY), n.curves_of(blocks, drafting, length)
    return choose(  # type: ignore[no-any-return]
        rule,
        mode,
        draft_tokens,
        threshold,
        curves[n.CONDITIONAL],
        curves[n.SURVIVAL],
        n.block_column(blocks, drafting, n.SLOT),
        n.block_column(blocks, drafting, n.BLOCK_LIMIT),
        n.block_column(blocks, drafting, n.CONTEXT),
        wholes2(desk, d.WHOLE),
        reals2(desk, d.REAL),
        reals2(desk, d.BASE),
        reals2(desk, d.DRIFT),
        reals(desk, d.CURVE),
        reals(desk, d.RATES),
        n.work_of(sheet),
        n.real_column(sheet, count, n.WEIGHT).sum(),
        memory[b.PRICE],
        memory[b.DECAY],
        doubles_at(past, past_gains),
        past_blocks,
        doubles_at(gains, drafting * length if gains else 0),
        n.block_column(blocks, drafting, n.LENGTH),
    )


@entry
def observe(
    desk_address: int,
    sheet: int,
    count: int,
    certainty: Array,
    blocks: int,
    drafting: int,
    length: int,
    requests: int,
    rows: int,
    context: int,
    row_context: int,
    prefill: int,
    absorbed: int,
    caught_up: int,
    kept: int,
    verify_s: float,
    draft_s: float,
    absorb_s: float,
    changed: bool,
    renew: bool,
) -> tuple[float, float]:
    """Take in a finished round -> what it was to take, and the price of a second in it. Its work goes onto the sheet.

    Args:
        certainty: of the sheet's requests, as `native_certainty.learn`.
        blocks: of so many drafts of so many tokens, with lengths and what was kept of them; 0 of none.
        kept: draft tokens, of all rows.
        changed: others decode than in the round before: what the host does once for newcomers is not the price of
            their drafts.
    """
    desk = desk_at(desk_address)
    memory, drift, base = reals(desk, d.MEMORY), reals2(desk, d.DRIFT), reals2(desk, d.BASE)
    work = n.work_of(sheet)
    work[c.REQUESTS], work[c.ROWS], work[c.CONTEXT], work[c.ROW_CONTEXT] = requests, rows, context, row_context
    work[c.PREFILL], work[c.DRAFTING], work[c.DRAFT_CONTEXT], work[c.DRAFT_SHARE] = prefill, drafting, 0.0, 1.0
    work[c.ABSORBED], work[c.CAUGHT_UP] = absorbed, caught_up
    if drafting:
        work[c.DRAFT_CONTEXT] = n.block_column(blocks, drafting, n.CONTEXT).sum()
        work[c.DRAFT_SHARE] = length / reals3(desk, d.CURVES).shape[2]
        take_in(desk_address, blocks, drafting, length)
    if changed:
        drift[c.SEEN, c.WARM] = min(drift[c.SEEN, c.WARM], c.WARMED - 1)
    seconds = np.empty(3)
    seconds[c.VERIFY], seconds[c.DRAFT], seconds[c.ABSORB] = verify_s, draft_s, absorb_s
    took_s = seconds.sum()
    if drafting and requests and not prefill:
        looked(took_s, 1.0 + kept / requests, memory)
    check = memory[b.CHECKING] == 1
    expected_s = learn(
        n.whole_column(sheet, count, n.SLOT),
        certainty,
        reals2(desk, d.REAL),
        base,
        drift,
        reals(desk, d.CURVE),
        reals(desk, d.RATES),
        work,
        seconds,
        renew or check,
        check,
    )
    if check and not (SURE * took_s < expected_s and SURE * expected_s < took_s):
        memory[b.CHECK_AFTER] = 0.0  # what was believed of such rounds was wrong: look once more
    return expected_s, memory[b.PRICE]


@entry
def take_in(desk_address: int, blocks: int, drafting: int, length: int) -> None:
    """What became of blocks: `native_reliability.teach` and `native_blocks.saw`."""
    desk = desk_at(desk_address)
    whole, slots = wholes2(desk, d.WHOLE), n.block_column(blocks, drafting, n.SLOT)
    verified, kept = n.block_column(blocks, drafting, n.LENGTH), n.block_column(blocks, drafting, n.KEPT)
    curves = n.curves_of(blocks, drafting, length)
    bands = np.empty(drafting, np.int64)
    for i in range(drafting):
        bands[i] = whole[slots[i], b.BAND]
    teach(
        bands,
        curves[n.LOGIT],
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
        curves[n.SURVIVAL],
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
