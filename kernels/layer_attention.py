"""The attention stage of a layer, in native code: which pages a group of rows sees, and the work's chunks."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from kernels import layer_frame as f
from kernels.attention import attend
from kernels.jit import native
from kernels.simd import load_int, never_inline, store_int
from kernels.threads import claim, finish


@native
def _list_pages(frame, tables, k_pages, v_pages, kv_heads, head, page_bytes, sequence, base, limit, lists):
    """Addresses and slots in use of the pages from `base` on that hold the first `limit` positions, and of a block.

    `tables` is where the page tables lie. Returns how many they are.
    """
    step = 8 * f.word(frame, f.TILE_LIMIT)
    tiles = (limit + 15) // 16 - base
    table = tables + 8 * (sequence * f.word(frame, f.TABLE_WIDTH) + base)
    for tile in range(tiles):
        offset = (f.word(table, tile) * kv_heads + head) * page_bytes
        store_int(lists + 8 * tile, k_pages + offset)
        store_int(lists + step + 8 * tile, v_pages + offset)
        store_int(lists + 2 * step + 8 * tile, min(16, limit - 16 * (base + tile)))
    for page in range(f.word(frame, f.BLOCK_PAGES)):
        offset = ((sequence * f.word(frame, f.BLOCK_PAGES) + page) * kv_heads + head) * page_bytes
        store_int(lists + 8 * tiles, f.word(frame, f.BLOCK_K) + offset)
        store_int(lists + step + 8 * tiles, f.word(frame, f.BLOCK_V) + offset)
        store_int(lists + 2 * step + 8 * tiles, min(16, f.word(frame, f.BLOCK) - 16 * page))
        tiles += 1
    return tiles


@native
def attention_stage(frame, stage, layer, k_pages, v_pages, out_stride, out_item, scratch):
    """Attention of every group of rows (kernels.layer_prepare) and key/value head: one chunk each.

    Rows of the result lie `out_stride` bytes apart; its numbers have `out_item` bytes, two those of bfloat16.
    """
    never_inline()
    counters, rows = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS)
    heads, kv_heads, head_dim = f.word(layer, f.HEADS), f.word(layer, f.KV_HEADS), f.word(layer, f.HEAD_DIM)
    group = heads // kv_heads
    item = f.word(frame, f.ITEM)
    page_bytes = head_dim * 16 * item
    window, block = f.word(layer, f.WINDOW), f.word(frame, f.BLOCK)
    tables = f.word(frame, f.WINDOW_TABLE)
    if window == 0 or tables == 0:
        tables = f.word(frame, f.PAGE_TABLE)
    lists = scratch + f.SPILL
    step = 8 * f.word(frame, f.TILE_LIMIT)
    sums = lists + 3 * step
    scores = sums + f.word(frame, f.SUMS_SIZE)
    chunks = f.word(frame, f.GROUP_COUNT) * kv_heads
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        entry, head = chunk // kv_heads, chunk % kv_heads
        row = f.word(f.word(frame, f.GROUPS), 2 * entry)
        tokens = f.word(f.word(frame, f.GROUPS), 2 * entry + 1)
        positions = f.word(frame, f.POSITIONS) + 8 * row
        sequence = f.word(f.word(frame, f.SEQUENCE_OF_ROW), row)
        base = alike = 0
        if block:
            limit = f.word(f.word(frame, f.ANCHORS), sequence)
            tiles = _list_pages(frame, tables, k_pages, v_pages, kv_heads, head, page_bytes, sequence, 0, limit, lists)
            common = tiles
        else:
            lowest, limit = load_int(positions), 0
            for i in range(tokens):
                lowest = min(lowest, f.word(positions, i))
                limit = max(limit, f.word(positions, i) + 1)
            if window:  # the last row's begins at limit − window
                base = max(0, lowest + 1 - window) // 16
                alike = (max(0, limit - window) + 15) // 16 - base
            tiles = _list_pages(
                frame, tables, k_pages, v_pages, kv_heads, head, page_bytes, sequence, base, limit, lists
            )
            common = max(alike, (lowest + 1) // 16 - base)
        attend(
            tokens,
            group,
            head_dim,
            f.word(frame, f.QUERIES) + (head * rows + row) * group * head_dim * item,
            lists,
            lists + step,
            lists + 2 * step,
            tiles,
            alike,
            common,
            base,
            window,
            block,
            positions,
            scores,
            f.word(frame, f.SCORE_STRIDE),
            sums,
            f.word(frame, f.ATTENDED) + row * out_stride + head * group * head_dim * out_item,
            out_stride,
            out_item,
            item,
        )
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)
