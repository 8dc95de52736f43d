"""Runs layers natively, alone or with what stands around them: lays out the frame, and calls the stages in order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import functools
import threading
from array import array
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import layer_frame as f
from kernels import layer_native as stages
from kernels.attention import GROUP_ROWS, PAGES_AHEAD
from kernels.jit import routine
from kernels.layer_prepare import prepare_stage
from kernels.threads import get_threads, run
from kernels.values import PAGE, BlockRows, Ends, LayerStack, RopeTable, Rows

_ERRORS = {
    f.BAD_POSITION: "a position lies outside the rope table",
    f.BAD_PAGE: "the page table misses a page that a row attends to, or names one that does not exist",
    f.BAD_SLOT: "a slot lies outside the cache",
    f.BAD_LAYER: "layers, or their caches, differ in shape",
    f.BAD_TOKEN: "a token lies outside the embedding",
    f.BAD_LOGIT_ROW: "a row that is to have logits does not exist",
}


def refuse(error: int) -> None:
    """Raises ValueError if a run left this in its frame."""
    if error:
        raise ValueError(_ERRORS[error])


@routine
def run_frame(frame, worker):
    """All layers of the frame, on one of the threads."""
    prepare_stage(frame)
    if f.word(frame, f.ERROR):
        return
    stage = 1
    scratch = f.word(frame, f.SCRATCH) + worker * f.word(frame, f.SCRATCH_SIZE)
    for index in range(f.word(frame, f.LAYERS)):
        layer = f.word(f.word(frame, f.LAYER_TABLE), 2 * index)
        cache = f.word(f.word(frame, f.LAYER_TABLE), 2 * index + 1)
        k_pages, v_pages = f.word(cache, f.CACHE_K), f.word(cache, f.CACHE_V)
        stages.run_layer(frame, stage, index, layer, k_pages, v_pages, scratch)
        stage += f.STAGES_PER_LAYER
    stages.leave_stages(frame, stage, scratch)


class _Arena(threading.local):
    """Scratch memory, grown as needed, one for each calling thread."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.start = 0

    def reserve(self, size: int) -> int:
        """The address of at least `size` bytes, on a cache line of their own."""
        if size + 64 > self.memory.size:
            self.memory = np.empty(2 * size + 64, np.uint8)
            self.start = (self.memory.ctypes.data + 63) & -64
        return self.start


_arena = _Arena()


@functools.lru_cache(maxsize=512)
def _layout(
    shape: tuple[int, ...], rows: int, sequences: int, width: int, block: int, threads: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Offsets of the regions that a call scribbles on, the sizes that the frame wants to know, and bytes in all.

    shape: as in LayerStack.
    """
    hidden, heads, kv_heads, head_dim, intermediate, item = shape
    block_pages = (block + PAGE - 1) // PAGE
    tile_limit = width + block_pages + PAGES_AHEAD + 4  # page lists are read past their ends, to prefetch
    score_stride = 64 * (tile_limit | 1)  # an odd number of lines: rows do not share cache sets
    group_rows = max(GROUP_ROWS, heads // kv_heads)
    sums_size = group_rows * head_dim * 4
    attention_size = 24 * tile_limit + sums_size + group_rows * score_stride
    rounded = rows * (2 * max(hidden, heads * head_dim, intermediate) + 64)
    products_size = max(rounded, min(rows, f.FEW_ROWS) * hidden * 4) + hidden * 4
    scratch_size = f.SPILL + max(attention_size, products_size) + 64 & -64
    block_bytes = sequences * block_pages * kv_heads * head_dim * PAGE * item
    sizes = (
        rows * hidden * 4,
        rows * (heads + 2 * kv_heads) * head_dim * 4,
        rows * heads * head_dim * 4,
        rows * heads * head_dim * 4,
        rows * ((2 * intermediate + 31) // 32 * 128),
        rows * intermediate * 4 + 64,
        rows * 16,
        block_bytes,
        block_bytes,
        scratch_size * threads,
        rows * 24 if block else 0,
        rows * hidden * 4,
    )
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += (size + 127) & -64
    return tuple(offsets), (block_pages, scratch_size, score_stride, sums_size, tile_limit), end


@functools.lru_cache(maxsize=512)
def _regions(sizes: tuple[Any, ...], base: int) -> tuple[tuple[int, ...], int, int, int]:
    """The frame's words from NORMED to ITEM for `_layout(*sizes)` at an address; pages of a block; and the addresses of
    what blocks describe of their rows, and of rows that come from an embedding."""
    offsets, (block_pages, scratch_size, score_stride, sums_size, tile_limit), _ = _layout(*sizes)
    *first, groups, block_k, block_v, scratch, described, own_x = (base + offset for offset in offsets)
    words = (
        *(*first, groups, 0, block_k, block_v),
        *(scratch, scratch_size, score_stride, sums_size, tile_limit, sizes[0][5]),
    )
    return words, block_pages, described, own_x


@functools.lru_cache(maxsize=64)
def _columns(capture: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """By layer, the embedding's output first: which column of the features keeps its output, −1 for none."""
    columns = [-1] * (layers + 1)
    for column, index in enumerate(capture):
        columns[index + 1] = column
    return tuple(columns)


def run_layers(
    x: Tensor,
    stack: LayerStack,
    rope: RopeTable,
    batch: Rows | BlockRows,
    capture: tuple[int, ...] = (),
    qkv_start: Tensor | None = None,
) -> Tensor | None:
    """Run x [T, H] through the layers in place, see `kernels.decoder_stack`, `kernels.decoder_layer` and
    `kernels.draft_stack`.

    Raises:
        ValueError: a tensor of the batch has another layout than promised, or points outside its cache.
    """
    rows, hidden = x.shape
    if rows == 0:
        return x.new_empty((0, len(capture) * hidden)) if capture else None
    if not x.is_contiguous() or hidden != stack.shape[0]:
        raise ValueError("x must be contiguous, and as wide as the layers")
    if qkv_start is not None and not qkv_start.is_contiguous():
        raise ValueError("qkv_start must be contiguous")
    start = qkv_start.data_ptr() if qkv_start is not None else 0
    return _run(rows, x.data_ptr(), stack, rope, batch, capture, (start, *_NOTHING_AROUND))


def stages_of(layers: int) -> int:
    return f.STAGES_PER_LAYER * layers + f.STAGES_AROUND


Sizes = tuple[tuple[int, ...], int, int, int, int, int]  # a stack's shape, rows, sequences, pages, block, threads


def scratch_of(sizes: Sizes) -> int:
    """The address of the calling thread's scratch for such a run; a later run that needs more may move it."""
    return _arena.reserve(_layout(*sizes)[2])


def holds(room: tuple[int, int, int], first: int, second: int, third: int, threads: int, base: int) -> bool:
    """Whether a frame that was laid for `room` still serves for what is wanted, with scratch that has not moved.

    Scratch only grows: what lies where it lay is no smaller.
    """
    fits = first <= room[0] and second <= room[1] and third <= room[2]
    return fits and threads == get_threads() and base == _arena.start


def grown(room: tuple[int, int, int], wanted: tuple[int, int, int]) -> tuple[int, int, int]:
    """Room for that, too, and some more, so that it seldom grows."""
    first, second, third = (max(own, roomy(other)) for own, other in zip(room, wanted, strict=True))
    return first, second, third


def roomy(count: int) -> int:
    """The next power of two, from 64 on the next multiple of 64: a row of logits may be half a megabyte."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


def lay_frame(
    sizes: Sizes,
    angles: int,
    x: int,
    stack: LayerStack,
    rope: RopeTable,
    places: tuple[int, int, int, int, int],
    features: tuple[int, int],
    last_words: tuple[int, ...],
    capture: tuple[int, ...] = (),
) -> array[int]:
    """What a run is told (`kernels.layer_frame`), all addresses that of live memory.

    Args:
        angles: positions that the ropes cover.
        x: of the rows, 0 where they come from an embedding.
        places: of positions, sequences and slots of the rows, of the page table, and of anchors. Blocks describe their
            rows themselves.
        features: their address and the bytes of a row.
        last_words: from QKV_START on.
    """
    _, rows, sequences, width, block, threads = sizes
    regions, block_pages, described, own_x = _regions(sizes, scratch_of(sizes))
    if block:
        places = (described, described + 8 * rows, described + 16 * rows, *places[3:])
    frame = array(
        "q",
        (
            *(0, threads, 0, rows, sequences, block, block_pages, len(stack.layers), width, angles),
            *(x or own_x, stack.address, *rope.words),
            *(*places, *features, 0),
            *regions,
            *last_words,
            *_columns(capture, len(stack.layers)),
        ),
    )
    frame[f.CAPTURE] = frame.buffer_info()[0] + 8 * f.FRAME_WORDS
    return frame


_NOTHING_AROUND = (0,) * (f.WINDOW_SLOTS - f.TOKENS)


def run_model(
    tokens: Tensor,
    ends: Ends,
    stack: LayerStack,
    rope: RopeTable,
    batch: Rows | BlockRows,
    capture: tuple[int, ...] = (),
    logit_rows: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens [T] through embedding, layers, last norm and head, see `kernels.forward`.

    Raises:
        ValueError: as `run_layers`; or a token or a logit row does not exist.
    """
    rows, hidden, vocabulary = tokens.shape[0], stack.shape[0], ends.head.n
    for given in (tokens, logit_rows, kept):
        if given is not None and (given.dtype != torch.int64 or not given.is_contiguous()):
            raise ValueError("tokens, logit rows and kept must be contiguous int64")
    if kept is not None and kept.shape[0] != rows:
        raise ValueError("kept must have one entry a row")
    if ends.head.k != hidden:
        raise ValueError("the embedding is not as wide as the layers")
    count = rows if logit_rows is None else logit_rows.shape[0]
    logits, last = torch.empty(count, vocabulary), torch.empty(count, hidden)
    if rows == 0:
        return logits, last, torch.empty(0, len(capture) * hidden) if capture else None
    table, item, vocabulary, *behind = ends.words
    chosen = logit_rows.data_ptr() if logit_rows is not None else 0
    wanted = kept.data_ptr() if kept is not None else 0
    outputs = (chosen, count, last.data_ptr(), logits.data_ptr(), wanted)
    around = (tokens.data_ptr(), table, item, vocabulary, *behind, *outputs)
    return logits, last, _run(rows, 0, stack, rope, batch, capture, (0, *around))


def _run(
    rows: int,
    x: int,
    stack: LayerStack,
    rope: RopeTable,
    batch: Rows | BlockRows,
    capture: tuple[int, ...],
    last_words: tuple[int, ...],
) -> Tensor | None:
    """x is the address of the rows, 0 where they come from an embedding; `last_words` the frame's from QKV_START on."""
    shape, table = stack.shape, batch.page_table
    hidden, head_dim = shape[0], shape[3]
    sequences, width = table.shape
    block, windows = 0, (0, 0)
    if isinstance(batch, BlockRows):
        block = batch.block_size
        given = [batch.anchor_positions, table]
        fits = len(batch.anchor_positions) == sequences and rows == sequences * block
        if stack.windowed:
            raise ValueError("layers with a window do not run on blocks")
    else:
        given = [batch.positions, batch.row_sequence, batch.slots, table]
        fits = batch.positions.shape[0] == batch.row_sequence.shape[0] == batch.slots.shape[0] == rows
        if batch.window_slots is not None and batch.window_table is not None and stack.windowed:
            given += [batch.window_slots, batch.window_table]
            fits = fits and batch.window_slots.shape[0] == rows and batch.window_table.shape == table.shape
            windows = batch.window_slots.data_ptr(), batch.window_table.data_ptr()
    angles, half = rope.cos.shape
    if stack.angles is not None:
        angles = min(angles, stack.angles)
    if not fits or half * 2 != head_dim:
        raise ValueError("the batch's tensors do not fit the rows, or the rope table does not fit the heads")
    for tensor in given:
        if tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError("positions, slots and page tables must be contiguous int64")
    if isinstance(batch, BlockRows):
        places = (0, 0, 0, table.data_ptr(), batch.anchor_positions.data_ptr())
    else:
        positions, owners, slots = (t.data_ptr() for t in (batch.positions, batch.row_sequence, batch.slots))
        places = (positions, owners, slots, table.data_ptr(), 0)
    features = torch.empty(rows, len(capture) * hidden) if capture else None
    kept = (features.data_ptr() if features is not None else 0, len(capture) * hidden * 4)
    sizes = (shape, rows, sequences, width, block, get_threads())
    frame = lay_frame(sizes, angles, x, stack, rope, places, kept, (*last_words, *windows), capture)
    run(run_frame(), frame.buffer_info()[0], stages_of(len(stack.layers)))
    refuse(frame[f.ERROR])
    return features
