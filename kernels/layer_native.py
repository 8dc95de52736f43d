"""The stages of a layer, in native code.

Every stage is a number of chunks that threads claim (kernels.threads). A chunk owns the rows or columns that it
writes. Arguments lie in a frame (kernels.layer_frame).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np

from kernels import layer_frame as f
from kernels.jit import native
from kernels.layer_attention import attention_stage
from kernels.rms_norm import norm_row
from kernels.rope import rotate
from kernels.simd import (
    exp,
    first_lane,
    load,
    load_double,
    load_float,
    never_inline,
    splat,
    store,
    store_float,
    store_narrow,
    store_narrow_float,
)
from kernels.threads import claim, finish
from kernels.tiles import multiply_panels, narrow_stride, round_rows
from kernels.values import PAIRED


@native
def multiply_stage(counters, stage, threads, rows, x, x_stride, w, form, n, k, out, out_stride, accumulate, scratch):
    """out [rows, n] (+)= x [rows, k] wᵀ, panels shared out among the threads.

    `scratch` holds SPILL bytes, and behind them room for the rows in bfloat16 if the panels are PAIRED: each
    thread rounds all of them for itself, which is cheaper than waiting for another.
    """
    never_inline()
    if form == PAIRED:
        round_rows(rows, x, x_stride, k, scratch + f.SPILL)
        x, x_stride = scratch + f.SPILL, narrow_stride(k)
    panels = (n + 31) // 32
    size = panels
    if counters:
        size = (panels + 4 * threads - 1) // (4 * threads)
    chunks = (panels + size - 1) // size
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        first, last = chunk * size, min(panels, (chunk + 1) * size)
        multiply_panels(rows, x, x_stride, w, form, n, first, last, k, out, out_stride, accumulate, scratch)
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def _copy(source, to, floats):
    whole = floats // 16 * 16
    for column in range(0, whole, 16):
        store(to + 4 * column, load(source + 4 * column))
    for column in range(whole, floats):
        store_float(to + 4 * column, load_float(source + 4 * column))


@native
def _norm_stage(frame, stage, layer, weight, eps, capture, qkv_width):
    """Normalise the rows of x; keep x where the drafter wants it; lay what q, k and v start from, if anything."""
    never_inline()
    counters, rows, hidden = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS), f.word(layer, f.HIDDEN)
    chunks = rows if counters else 1
    size = 1 if counters else rows
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        for row in range(chunk * size, (chunk + 1) * size):
            x = f.word(frame, f.X) + row * hidden * 4
            if weight:
                norm_row(x, weight, f.word(frame, f.NORMED) + row * hidden * 4, hidden, eps)
            if capture >= 0:
                kept = f.word(frame, f.FEATURES) + row * f.word(frame, f.FEATURE_STRIDE) + capture * hidden * 4
                _copy(x, kept, hidden)
            start = f.word(layer, f.BIAS)
            if f.word(frame, f.QKV_START):
                start = f.word(frame, f.QKV_START) + row * qkv_width * 4
            if qkv_width and start:
                _copy(start, f.word(frame, f.QKV) + row * qkv_width * 4, qkv_width)
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def store_key_value(head, v, cos, sin, head_dim, k_pages, v_pages, kv_heads, kv_head, slot, item):
    """Rotate the normed key at `head` in place, and write it and the value at v to their slot, `item` bytes each."""
    rotate(head, cos, sin, head_dim, np.float32(1.0))
    page = (slot // 16 * kv_heads + kv_head) * head_dim * 16 * item
    k_to, v_to = k_pages + page + slot % 16 * 4, v_pages + page
    v_to += slot % 16 // 2 * head_dim * 4 + slot % 2 * 2 if item == 2 else slot % 16 * head_dim * 4
    if item == 2:
        for i in range(head_dim):
            store_narrow_float(k_to + i // 2 * 64 + i % 2 * 2, load_float(head + 4 * i))
        for i in range(head_dim):
            store_narrow_float(v_to + 4 * i, load_float(v + 4 * i))
    else:
        for i in range(head_dim):
            store_float(k_to + 64 * i, load_float(head + 4 * i))
        for i in range(0, head_dim, 16):
            store(v_to + 4 * i, load(v + 4 * i))


@native
def _store_stage(frame, stage, layer, k_pages, v_pages, scratch):
    """Norm and rotate q and k; scale q by head_dim^−½; write k and v to their pages."""
    never_inline()
    counters, rows = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS)
    heads, kv_heads, head_dim = f.word(layer, f.HEADS), f.word(layer, f.KV_HEADS), f.word(layer, f.HEAD_DIM)
    eps, group, size = load_double(layer + 8 * f.EPS), heads // kv_heads, head_dim * 4
    item = f.word(frame, f.ITEM)
    scale = np.float32(1.0 / np.sqrt(np.float64(head_dim)))
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < rows:
        position = f.word(f.word(frame, f.POSITIONS), chunk)
        cos = f.word(frame, f.COS) + position * head_dim * 2
        sin = f.word(frame, f.SIN) + position * head_dim * 2
        qkv = f.word(frame, f.QKV) + chunk * (heads + 2 * kv_heads) * size
        for head in range(heads):
            # Queries lie [kv_heads, rows, group, head_dim]: a group's rows follow each other.
            place = ((head // group * rows + chunk) * group + head % group) * head_dim
            to = f.word(frame, f.QUERIES) + place * item
            query = scratch if item == 2 else to
            norm_row(qkv + head * size, f.word(layer, f.Q_NORM), query, head_dim, eps)
            rotate(query, cos, sin, head_dim, scale)
            if item == 2:
                for i in range(0, head_dim, 16):
                    store_narrow(to + 2 * i, load(query + 4 * i))
        slot = f.word(f.word(frame, f.SLOTS), chunk)
        for head in range(kv_heads):
            norm_row(qkv + (heads + head) * size, f.word(layer, f.K_NORM), scratch, head_dim, eps)
            v = qkv + (heads + kv_heads + head) * size
            store_key_value(
                scratch, v, cos, sin, head_dim, k_pages, v_pages, kv_heads, head, slot, f.word(frame, f.ITEM)
            )
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, rows)


@native
def _activation_stage(frame, stage, intermediate, stride):
    """silu(gate) · up, in chunks of 64 columns of all rows."""
    never_inline()
    counters, rows = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS)
    width = 64 if counters else intermediate
    chunks = (intermediate + width - 1) // width
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        first, last = chunk * width, min(intermediate, (chunk + 1) * width)
        for row in range(rows):
            gate = f.word(frame, f.GATE_UP) + row * stride
            up, out = gate + intermediate * 4, f.word(frame, f.ACTIVATED) + row * intermediate * 4
            column = first
            while column + 16 <= last:
                g = load(gate + 4 * column)
                silu = g / (splat(1.0) + exp(splat(0.0) - g))
                store(out + 4 * column, silu * load(up + 4 * column))
                column += 16
            while column < last:
                g = splat(load_float(gate + 4 * column))
                silu = g / (splat(1.0) + exp(splat(0.0) - g))
                store_float(out + 4 * column, first_lane(silu) * load_float(up + 4 * column))
                column += 1
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def run_layer(frame, stage, index, layer, k_pages, v_pages, scratch):
    """One layer: x += o(attention(norm x)); x += down(silu(gate) · up of norm x). Takes 9 stages from `stage` on."""
    never_inline()
    counters, threads, rows = f.word(frame, f.COUNTERS), f.word(frame, f.THREADS), f.word(frame, f.ROWS)
    hidden, intermediate = f.word(layer, f.HIDDEN), f.word(layer, f.INTERMEDIATE)
    attention_width = f.word(layer, f.HEADS) * f.word(layer, f.HEAD_DIM)
    qkv_width = attention_width + 2 * f.word(layer, f.KV_HEADS) * f.word(layer, f.HEAD_DIM)
    up_stride = (2 * intermediate + 31) // 32 * 128
    x, normed, eps = f.word(frame, f.X), f.word(frame, f.NORMED), load_double(layer + 8 * f.EPS)
    if f.word(frame, f.BLOCK):
        store_k, store_v = f.word(frame, f.BLOCK_K), f.word(frame, f.BLOCK_V)
    else:
        store_k, store_v = k_pages, v_pages

    capture = f.word(f.word(frame, f.CAPTURE), index)
    _norm_stage(frame, stage, layer, f.word(layer, f.INPUT_NORM), eps, capture, qkv_width)
    multiply_stage(
        counters,
        stage + 1,
        threads,
        rows,
        normed,
        hidden * 4,
        f.word(layer, f.W_QKV),
        f.word(layer, f.W_QKV + 1),
        qkv_width,
        hidden,
        f.word(frame, f.QKV),
        qkv_width * 4,
        f.word(layer, f.BIAS) | f.word(frame, f.QKV_START),
        scratch,
    )
    _store_stage(frame, stage + 2, layer, store_k, store_v, scratch)
    attention_stage(frame, stage + 3, layer, k_pages, v_pages, scratch)
    multiply_stage(
        counters,
        stage + 4,
        threads,
        rows,
        f.word(frame, f.ATTENDED),
        attention_width * 4,
        f.word(layer, f.W_O),
        f.word(layer, f.W_O + 1),
        hidden,
        attention_width,
        x,
        hidden * 4,
        1,
        scratch,
    )
    _norm_stage(frame, stage + 5, layer, f.word(layer, f.POST_NORM), eps, -1, 0)
    multiply_stage(
        counters,
        stage + 6,
        threads,
        rows,
        normed,
        hidden * 4,
        f.word(layer, f.W_GATE_UP),
        f.word(layer, f.W_GATE_UP + 1),
        2 * intermediate,
        hidden,
        f.word(frame, f.GATE_UP),
        up_stride,
        0,
        scratch,
    )
    _activation_stage(frame, stage + 7, intermediate, up_stride)
    multiply_stage(
        counters,
        stage + 8,
        threads,
        rows,
        f.word(frame, f.ACTIVATED),
        intermediate * 4,
        f.word(layer, f.W_DOWN),
        f.word(layer, f.W_DOWN + 1),
        hidden,
        intermediate,
        x,
        hidden * 4,
        1,
        scratch,
    )


@native
def keep_last(frame, stage):
    """Copy the last layer's output, where it is captured."""
    layers = f.word(frame, f.LAYERS)
    capture = f.word(f.word(frame, f.CAPTURE), layers)
    if capture >= 0:
        _norm_stage(frame, stage, f.word(f.word(frame, f.LAYER_TABLE), 0), 0, 0.0, capture, 0)
