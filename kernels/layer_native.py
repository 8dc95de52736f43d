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
from kernels.layer_products import (
    add_normed_stage,
    gated,
    gated_stages,
    keep_row,
    leaves_narrow,
    multiply_stage,
    norm_stage,
    project_stages,
)
from kernels.rms_norm import norm_row
from kernels.rope import rotate
from kernels.simd import (
    copy_word,
    first_lane,
    load,
    load_double,
    load_float,
    never_inline,
    splat,
    store,
    store_every_other,
    store_float,
    store_narrow,
)
from kernels.threads import claim, finish
from kernels.tiles import is_narrow, narrow_stride


@native
def store_key_value(head, v, cos, sin, head_dim, k_pages, v_pages, kv_heads, kv_head, slot, item):
    """Rotate the normed key at `head`, which is overwritten, and write it and the value at v to their slot, in numbers
    of `item` bytes. Another thread may be writing the slot beside, which shares words of the value."""
    rotate(head, cos, sin, head_dim, np.float32(1.0))
    page = (slot // 16 * kv_heads + kv_head) * head_dim * 16 * item
    k_to, v_to = k_pages + page + slot % 16 * 4, v_pages + page
    v_to += slot % 16 // 2 * head_dim * 4 + slot % 2 * 2 if item == 2 else slot % 16 * head_dim * 4
    if item == 2:
        odd, v_to = slot % 2, v_to - slot % 2 * 2
        for i in range(0, head_dim, 16):  # in place: what is written has been read
            store_narrow(head + 2 * i, load(head + 4 * i))
            store_every_other(v_to + 4 * i, load(v + 4 * i), odd)
        for pair in range(head_dim // 2):
            copy_word(head + 4 * pair, k_to + 64 * pair)
    else:
        for i in range(head_dim):
            store_float(k_to + 64 * i, load_float(head + 4 * i))
        for i in range(0, head_dim, 16):
            store(v_to + 4 * i, load(v + 4 * i))


@native
def _store_stage(frame, stage, layer, k_pages, v_pages, scratch):
    """Norm and rotate q and k; scale q; write k and v to their pages.

    A chunk is what attention's is, a group of rows and a key/value head: neighbouring slots share cache lines, which
    threads that took turns row by row would take from each other.
    """
    never_inline()
    counters, rows = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS)
    heads, kv_heads, head_dim = f.word(layer, f.HEADS), f.word(layer, f.KV_HEADS), f.word(layer, f.HEAD_DIM)
    eps, group, size = load_double(layer + 8 * f.EPS), heads // kv_heads, head_dim * 4
    item = f.word(frame, f.ITEM)
    scale = np.float32(load_double(layer + 8 * f.SCORE_SCALE))
    slots = f.word(frame, f.WINDOW_SLOTS)
    if f.word(layer, f.WINDOW) == 0 or slots == 0:
        slots = f.word(frame, f.SLOTS)
    cosines, sines = f.word(frame, f.COS), f.word(frame, f.SIN)
    if f.word(layer, f.OWN_COS):
        cosines, sines = f.word(layer, f.OWN_COS), f.word(layer, f.OWN_SIN)
    chunks = f.word(frame, f.GROUP_COUNT) * kv_heads
    done, chunk = 0, claim(counters, stage, -1)
    while chunk < chunks:
        entry, kv_head = chunk // kv_heads, chunk % kv_heads
        first = f.word(f.word(frame, f.GROUPS), 2 * entry)
        for row in range(first, first + f.word(f.word(frame, f.GROUPS), 2 * entry + 1)):
            position = f.word(f.word(frame, f.POSITIONS), row)
            cos = cosines + position * head_dim * 2
            sin = sines + position * head_dim * 2
            qkv = f.word(frame, f.QKV) + row * (heads + 2 * kv_heads) * size
            for head in range(group):
                # Queries lie [kv_heads, rows, group, head_dim]: a group's rows follow each other.
                to = f.word(frame, f.QUERIES) + ((kv_head * rows + row) * group + head) * head_dim * item
                query = scratch if item == 2 else to
                norm_row(qkv + (kv_head * group + head) * size, f.word(layer, f.Q_NORM), query, head_dim, eps)
                rotate(query, cos, sin, head_dim, scale)
                if item == 2:
                    for i in range(0, head_dim, 16):
                        store_narrow(to + 2 * i, load(query + 4 * i))
            norm_row(qkv + (heads + kv_head) * size, f.word(layer, f.K_NORM), scratch, head_dim, eps)
            v, slot = qkv + (heads + kv_heads + kv_head) * size, f.word(slots, row)
            store_key_value(scratch, v, cos, sin, head_dim, k_pages, v_pages, kv_heads, kv_head, slot, item)
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def _activation_stage(frame, stage, intermediate, stride, activation):
    """Gate times up, in chunks of 64 columns of all rows."""
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
                store(out + 4 * column, gated(load(gate + 4 * column), load(up + 4 * column), activation))
                column += 16
            while column < last:
                g, u = splat(load_float(gate + 4 * column)), splat(load_float(up + 4 * column))
                store_float(out + 4 * column, first_lane(gated(g, u, activation)))
                column += 1
        done, chunk = done + 1, claim(counters, stage, chunk)
    finish(counters, stage, done, chunks)


@native
def run_layer(frame, stage, index, layer, k_pages, v_pages, scratch):
    """One layer: x += o(attention(norm x)); x += down(act(gate) · up of norm x). Takes 11 stages from `stage` on.

    Where the layer norms what its halves add, the products go to where normed rows lie, which nobody needs by then.
    """
    never_inline()
    counters, threads, rows = f.word(frame, f.COUNTERS), f.word(frame, f.THREADS), f.word(frame, f.ROWS)
    hidden, intermediate = f.word(layer, f.HIDDEN), f.word(layer, f.INTERMEDIATE)
    attention_width = f.word(layer, f.HEADS) * f.word(layer, f.HEAD_DIM)
    qkv_width = attention_width + 2 * f.word(layer, f.KV_HEADS) * f.word(layer, f.HEAD_DIM)
    x, eps = f.word(frame, f.X), load_double(layer + 8 * f.EPS)
    if f.word(frame, f.BLOCK):
        store_k, store_v = f.word(frame, f.BLOCK_K), f.word(frame, f.BLOCK_V)
    else:
        store_k, store_v = k_pages, v_pages

    project_stages(frame, stage, layer, eps, f.word(f.word(frame, f.CAPTURE), index), qkv_width, scratch)
    _store_stage(frame, stage + 2, layer, store_k, store_v, scratch)
    narrow = leaves_narrow(f.word(layer, f.W_O + 1), attention_width)
    stride, item = (narrow_stride(attention_width), 2) if narrow else (attention_width * 4, 4)
    attention_stage(frame, stage + 3, layer, k_pages, v_pages, stride, item, scratch)
    sandwich = f.word(layer, f.ATTENTION_NORM) != 0
    to, accumulate = (f.word(frame, f.NORMED), 0) if sandwich else (x, 1)
    multiply_stage(
        counters, stage + 4, threads, rows, f.word(frame, f.ATTENDED), stride, f.word(layer, f.W_O),
        f.word(layer, f.W_O + 1), hidden, attention_width, to, hidden * 4, accumulate, narrow, scratch,
    )  # fmt: skip
    if sandwich:
        add_normed_stage(frame, stage + 9, to, f.word(layer, f.ATTENTION_NORM), eps, x, hidden)
    activated, form = f.word(frame, f.ACTIVATED), f.word(layer, f.W_DOWN + 1)
    fused = intermediate % 32 == 0
    if fused:
        gated_stages(frame, stage + 5, layer, eps, scratch)
    else:
        normed, up_stride = f.word(frame, f.NORMED), (2 * intermediate + 31) // 32 * 128
        norm_stage(frame, stage + 5, rows, x, 0, f.word(layer, f.POST_NORM), eps, normed, hidden, 0, 0)
        multiply_stage(
            counters, stage + 6, threads, rows, normed, hidden * 4, f.word(layer, f.W_GATE_UP),
            f.word(layer, f.W_GATE_UP + 1), 2 * intermediate, hidden, f.word(frame, f.GATE_UP), up_stride, 0, 0,
            scratch,
        )  # fmt: skip
        _activation_stage(frame, stage + 7, intermediate, up_stride, f.word(layer, f.ACTIVATION))
    narrow = fused and is_narrow(form)
    stride = narrow_stride(intermediate) if narrow else intermediate * 4
    multiply_stage(
        counters, stage + 8, threads, rows, activated, stride, f.word(layer, f.W_DOWN), form, hidden, intermediate, to,
        hidden * 4, accumulate, narrow, scratch,
    )  # fmt: skip
    if sandwich:
        add_normed_stage(frame, stage + 10, to, f.word(layer, f.FEEDFORWARD_NORM), eps, x, hidden)


@native
def leave_stages(frame, stage, scratch):
    """Three stages behind the layers: the last one's output kept, the last norm, the vocabulary head."""
    counters, rows, layers = f.word(frame, f.COUNTERS), f.word(frame, f.ROWS), f.word(frame, f.LAYERS)
    hidden = f.word(f.word(f.word(frame, f.LAYER_TABLE), 0), f.HIDDEN)
    capture = f.word(f.word(frame, f.CAPTURE), layers)
    if capture >= 0:
        done, chunk = 0, claim(counters, stage, -1)
        while chunk < rows:
            keep_row(frame, chunk, hidden, capture)
            done, chunk = done + 1, claim(counters, stage, chunk)
        finish(counters, stage, done, rows)
    count = f.word(frame, f.LOGIT_COUNT)
    if f.word(frame, f.TOKENS) == 0 or count == 0:
        return
    x, last, eps = f.word(frame, f.X), f.word(frame, f.LAST_HIDDEN), load_double(frame + 8 * f.LAST_EPS)
    index, weight = f.word(frame, f.LOGIT_ROWS), f.word(frame, f.LAST_NORM)
    norm_stage(frame, stage + 1, count, x, index, weight, eps, last, hidden, 0, 0)
    vocabulary = f.word(frame, f.VOCABULARY)
    multiply_stage(
        counters, stage + 2, f.word(frame, f.THREADS), count, last, hidden * 4, f.word(frame, f.HEAD),
        f.word(frame, f.HEAD_FORM), vocabulary, hidden, f.word(frame, f.LOGITS), vocabulary * 4, 0, 0, scratch,
    )  # fmt: skip
