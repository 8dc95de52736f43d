"""Runs layers natively: lays out the frame, and calls the stages in order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import layer_frame as f
from kernels import layer_native as stages
from kernels.attention import GROUP_ROWS, PAGES_AHEAD
from kernels.jit import routine
from kernels.layer_prepare import prepare_stage
from kernels.threads import get_threads, run
from kernels.values import PAGE, BlockRows, LayerCache, LayerWeights, RopeTable, Rows

_ERRORS = {
    f.BAD_POSITION: "a position lies outside the rope table",
    f.BAD_PAGE: "the page table misses a page that a row attends to, or names one that does not exist",
    f.BAD_SLOT: "a slot lies outside the cache",
    f.BAD_LAYER: "layers, or their caches, differ in shape",
}


@routine
def _layers(frame, worker):
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
    stages.keep_last(frame, stage)


class _Arena(threading.local):
    """Scratch memory, grown as needed, one for each calling thread."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.start = 0

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Addresses of regions of the given sizes in bytes, each on a cache line of its own."""
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += (size + 127) & -64
        if end + 64 > self.memory.size:
            self.memory = np.empty(2 * end + 64, np.uint8)
            self.start = (self.memory.ctypes.data + 63) & -64
        return [self.start + offset for offset in offsets]


_arena = _Arena()


def is_native(x: Tensor, layers: Sequence[LayerWeights], caches: Sequence[LayerCache]) -> bool:
    """Whether native code applies: CPU, float32, and a head_dim that is a multiple of 32."""
    return (
        x.dtype == torch.float32
        and x.is_cpu
        and all(layer.address for layer in layers)
        and all(cache.address for cache in caches)
    )


def run_layers(
    x: Tensor,
    layers: Sequence[LayerWeights],
    caches: Sequence[LayerCache],
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
    first = layers[0]
    block = batch.block_size if isinstance(batch, BlockRows) else 0
    table = batch.page_table
    sequences, width = table.shape
    if isinstance(batch, BlockRows):
        given = [batch.anchor_positions, table]
        fits = len(batch.anchor_positions) == sequences and rows == sequences * block
    else:
        given = [batch.positions, batch.row_sequence, batch.slots, table]
        fits = len(batch.positions) == len(batch.row_sequence) == len(batch.slots) == rows
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    if not fits or hidden != first.hidden or rope.cos.shape[1] * 2 != first.head_dim:
        raise ValueError("the batch's tensors do not fit x, or the rope table does not fit the heads")
    if qkv_start is not None and not qkv_start.is_contiguous():
        raise ValueError("qkv_start must be contiguous")
    for tensor in given:
        if tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError("positions, slots and page tables must be contiguous int64")

    heads, kv_heads, head_dim = first.heads, first.kv_heads, first.head_dim
    block_pages = (block + PAGE - 1) // PAGE
    tile_limit = width + block_pages + PAGES_AHEAD + 4  # page lists are read past their ends, to prefetch
    score_stride = 64 * (tile_limit | 1)  # an odd number of lines: rows do not share cache sets
    group_rows = max(GROUP_ROWS, heads // kv_heads)
    sums_size = group_rows * head_dim * 4
    intermediate = max(layer.intermediate for layer in layers)
    attention_size = 24 * tile_limit + sums_size + group_rows * score_stride
    narrow_size = rows * (2 * max(hidden, heads * head_dim, intermediate) + 64)
    scratch_size = f.SPILL + max(attention_size, narrow_size) + 64 & -64
    threads = get_threads()
    item = caches[0].k.dtype.itemsize
    block_bytes = sequences * block_pages * kv_heads * head_dim * PAGE * item
    regions = _arena.reserve(
        (
            rows * hidden * 4,
            rows * (heads + 2 * kv_heads) * head_dim * 4,
            rows * heads * head_dim * 4,
            rows * heads * head_dim * 4,
            rows * ((2 * intermediate + 31) // 32 * 128),
            rows * intermediate * 4,
            rows * 16,
            block_bytes,
            block_bytes,
            scratch_size * threads,
            rows * 24 if block else 0,
        )
    )
    normed, qkv, queries, attended, gate_up, activated, groups, block_k, block_v, scratch, described = regions
    if isinstance(batch, BlockRows):
        positions, row_sequence, slots = (described + 8 * rows * i for i in range(3))
        anchors = batch.anchor_positions.data_ptr()
    else:
        positions, row_sequence = batch.positions.data_ptr(), batch.row_sequence.data_ptr()
        slots, anchors = batch.slots.data_ptr(), 0
    descriptors = []
    for layer, cache in zip(layers, caches, strict=True):
        descriptors += [layer.address, cache.address]
    columns = [-1] * (len(layers) + 1)
    for column, index in enumerate(capture):
        columns[index + 1] = column
    features = x.new_empty((rows, len(capture) * hidden)) if capture else None
    frame = array(
        "q",
        (
            *(0, threads, 0, rows, sequences, block, block_pages, len(layers), width, len(rope.cos)),
            *(x.data_ptr(), 0, rope.cos.data_ptr(), rope.sin.data_ptr(), positions, row_sequence, slots),
            *(table.data_ptr(), anchors),
            *(features.data_ptr() if features is not None else 0, len(capture) * hidden * 4, 0),
            *(normed, qkv, queries, attended, gate_up, activated, groups, 0, block_k, block_v),
            *(scratch, scratch_size, score_stride, sums_size, tile_limit, item),
            qkv_start.data_ptr() if qkv_start is not None else 0,
            *descriptors,
            *columns,
        ),
    )
    address = frame.buffer_info()[0]
    frame[f.LAYER_TABLE] = address + 8 * f.FRAME_WORDS
    frame[f.CAPTURE] = address + 8 * (f.FRAME_WORDS + len(descriptors))
    run(_layers(), address, f.STAGES_PER_LAYER * len(layers) + 2)
    if frame[f.ERROR]:
        raise ValueError(_ERRORS[frame[f.ERROR]])
    return features
