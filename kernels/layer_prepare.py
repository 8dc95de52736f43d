"""The first stage of native layers: refuses batches that point outside, groups rows for attention, embeds tokens."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from kernels import layer_frame as f
from kernels.attention import GROUP_ROWS
from kernels.embedding import gather_rows
from kernels.jit import native
from kernels.simd import load_double, store_int
from kernels.threads import claim, finish
from kernels.values import PAGE


@native
def _describe_block(frame):
    """Positions, sequence and scratch slot of every row of R blocks of γ slots."""
    block = f.word(frame, f.BLOCK)
    for row in range(f.word(frame, f.ROWS)):
        sequence, i = row // block, row % block
        store_int(f.word(frame, f.POSITIONS) + 8 * row, f.word(f.word(frame, f.ANCHORS), sequence) + i)
        store_int(f.word(frame, f.SEQUENCE_OF_ROW) + 8 * row, sequence)
        slot = (sequence * f.word(frame, f.BLOCK_PAGES) + i // PAGE) * PAGE + i % PAGE
        store_int(f.word(frame, f.SLOTS) + 8 * row, slot)


@native
def _pages(frame, windows):
    """The fewest pages in a cache of the layers with a window, or of all that share the other page table."""
    table, least = f.word(frame, f.LAYER_TABLE), 1 << 40
    apart = f.word(frame, f.WINDOW_TABLE) != 0
    for index in range(f.word(frame, f.LAYERS)):
        if (apart and f.word(f.word(table, 2 * index), f.WINDOW) != 0) == windows:
            least = min(least, f.word(f.word(table, 2 * index + 1), f.CACHE_PAGES))
    return least


@native
def _check_windows(frame):
    """The same for layers with a window, where these have pages of their own: those that some row sees."""
    pages, width = _pages(frame, True), f.word(frame, f.TABLE_WIDTH)
    for row in range(f.word(frame, f.ROWS)):
        slot = f.word(f.word(frame, f.WINDOW_SLOTS), row)
        if slot < 0 or slot >= pages * PAGE:
            return f.BAD_SLOT
        table = f.word(frame, f.WINDOW_TABLE) + 8 * f.word(f.word(frame, f.SEQUENCE_OF_ROW), row) * width
        for tile in range(f.word(f.word(frame, f.POSITIONS), row) // PAGE + 1):
            if f.word(table, tile) < 0 or f.word(table, tile) >= pages:
                return f.BAD_PAGE
    return 0


@native
def _check(frame, pages):
    """0, or what is out of bounds: native code would read or write foreign memory."""
    for row in range(f.word(frame, f.ROWS)):
        position = f.word(f.word(frame, f.POSITIONS), row)
        sequence = f.word(f.word(frame, f.SEQUENCE_OF_ROW), row)
        if position < 0 or position >= f.word(frame, f.ANGLES):
            return f.BAD_POSITION
        if sequence < 0 or sequence >= f.word(frame, f.SEQUENCES):
            return f.BAD_PAGE
        needed = position // PAGE + 1
        if f.word(frame, f.BLOCK):
            anchor = f.word(f.word(frame, f.ANCHORS), sequence)
            if anchor < 0:
                return f.BAD_POSITION
            needed = (anchor + PAGE - 1) // PAGE
        else:
            slot = f.word(f.word(frame, f.SLOTS), row)
            if slot < 0 or slot >= pages * PAGE:
                return f.BAD_SLOT
        if needed > f.word(frame, f.TABLE_WIDTH):
            return f.BAD_PAGE
        table = f.word(frame, f.PAGE_TABLE) + 8 * sequence * f.word(frame, f.TABLE_WIDTH)
        for tile in range(needed):
            if f.word(table, tile) < 0 or f.word(table, tile) >= pages:
                return f.BAD_PAGE
    return 0


@native
def _same_shapes(frame):
    """Whether all layers and caches are shaped like the first: the frame's sizes hold for all of them."""
    table = f.word(frame, f.LAYER_TABLE)
    layer, cache = f.word(table, 0), f.word(table, 1)
    same = f.word(cache, f.CACHE_HEADS) == f.word(layer, f.KV_HEADS)
    same = same and f.word(cache, f.CACHE_HEAD_DIM) == f.word(layer, f.HEAD_DIM)
    for index in range(1, f.word(frame, f.LAYERS)):
        for size in (f.HIDDEN, f.HEADS, f.KV_HEADS, f.HEAD_DIM):
            same = same and f.word(f.word(table, 2 * index), size) == f.word(layer, size)
        for size in (f.CACHE_HEADS, f.CACHE_HEAD_DIM, f.CACHE_ITEM):
            same = same and f.word(f.word(table, 2 * index + 1), size) == f.word(cache, size)
    return same


@native
def _group_rows(frame, group):
    """Gather neighbouring rows of one sequence into groups that share the loads of its pages."""
    most = max(1, GROUP_ROWS // group)
    groups, row, rows = 0, 0, f.word(frame, f.ROWS)
    sequences = f.word(frame, f.SEQUENCE_OF_ROW)
    while row < rows:
        count = 1
        while count < most and row + count < rows and f.word(sequences, row + count) == f.word(sequences, row):
            count += 1
        store_int(f.word(frame, f.GROUPS) + 16 * groups, row)
        store_int(f.word(frame, f.GROUPS) + 16 * groups + 8, count)
        groups, row = groups + 1, row + count
    store_int(frame + 8 * f.GROUP_COUNT, groups)


@native
def _enter(frame, hidden):
    """Fill x with the tokens' rows of the embedding; 0, or what is out of bounds."""
    for i in range(f.word(frame, f.LOGIT_COUNT)):
        row = f.word(f.word(frame, f.LOGIT_ROWS), i) if f.word(frame, f.LOGIT_ROWS) else i
        if row < 0 or row >= f.word(frame, f.ROWS):
            return f.BAD_LOGIT_ROW
    inside = gather_rows(
        f.word(frame, f.ROWS),
        f.word(frame, f.TOKENS),
        f.word(frame, f.VOCABULARY),
        hidden,
        f.word(frame, f.EMBEDDING),
        f.word(frame, f.EMBEDDING_ITEM),
        load_double(frame + 8 * f.EMBEDDING_SCALE),
        f.word(frame, f.X),
    )
    return 0 if inside else f.BAD_TOKEN


@native
def prepare_stage(frame):
    """Stage 0, one chunk: leaves an error code, or 0, and the groups in the frame."""
    counters = f.word(frame, f.COUNTERS)
    done = 0
    if claim(counters, 0, -1) == 0:
        layer = f.word(f.word(frame, f.LAYER_TABLE), 0)
        if f.word(frame, f.BLOCK):
            _describe_block(frame)
        error = _check(frame, _pages(frame, False)) if _same_shapes(frame) else f.BAD_LAYER
        if error == 0 and f.word(frame, f.WINDOW_TABLE):
            error = _check_windows(frame)
        if error == 0 and f.word(frame, f.TOKENS):
            error = _enter(frame, f.word(layer, f.HIDDEN))
        store_int(frame + 8 * f.ERROR, error)
        _group_rows(frame, f.word(layer, f.HEADS) // f.word(layer, f.KV_HEADS))
        done = 1
    finish(counters, 0, done, 1)
