"""The sequential draft head and its sampling in native code: one request after the other, claimed by threads."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np

from kernels import layer_frame as f
from kernels.arrays import bytes_at, floats2_at, floats3_at, floats_at, wholes2_at, wholes_at, words3_at
from kernels.draft_head import gated_latent, recurrent_latent, sigmoid
from kernels.filters import filter_row, scale_row
from kernels.jit import native
from kernels.noise import Purpose, pick, uniform
from kernels.panel import PANEL, dot, panel_product
from kernels.simd import never_inline
from kernels.threads import atomic_load, atomic_store, claim, exchange_if, finish
from kernels.vector import MASS, draw, draw_by_mass, first_index, row_maximum, scaled_exp_row

# Words of the frame; the first is the counters'.
COUNT, BLOCK, WIDTH, VOCABULARY, BASE, HIDDEN, HIDDEN_SIZE, ANCHORS = range(1, 9)
KIND, W1, W1_ROWS, RANK, PANELS, PANEL_COUNT, NARROW = range(9, 16)
MIX, MIX_ROWS, MIX_COLUMNS, MIX_BIAS, CONFIDENCE_WEIGHT, CONFIDENCE_INPUTS, CONFIDENCE_BIAS = range(16, 23)
MEMO, MEMO_SLOTS, MEMO_STATE, IDS, ID_COUNT = range(23, 28)
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, COUPLED, POSITIONS, PROPOSALS = range(28, 36)
TOKENS, LOGITS, LOGIT_ROWS, LOG_Z, CONFIDENCE, CONFIDENCE_ROWS = range(36, 42)
WORDS = 42
NONE, VANILLA, GATED = range(3)  # kernels.draft_head.KINDS
_DRAFT, _COUPLED = int(Purpose.DRAFT), int(Purpose.COUPLED)


@native
def _add(base, bias, out):
    for v in range(out.shape[0]):
        out[v] = base[v] + bias[v]


@native
def _product(frame, features, out):
    """out = W2 · features."""
    never_inline()
    count, rank = f.word(frame, PANEL_COUNT), f.word(frame, RANK)
    if f.word(frame, NARROW):
        panel_product(words3_at(f.word(frame, PANELS), count, rank, PANEL // 2), features, out)
    else:
        panel_product(floats3_at(f.word(frame, PANELS), count, rank, PANEL), features, out)


@native
def _add_vanilla(frame, previous, base, own, room):
    """own = base + W2 · W1[previous], by what is remembered if it can be.

    A slot's second word counts what happens to it: who sees the same even number before and after reading has read
    what belongs to the first word. Who finds it odd, or changed, computes for himself.
    """
    never_inline()
    slots, padded = f.word(frame, MEMO_SLOTS), f.word(frame, PANEL_COUNT) * PANEL
    rank = f.word(frame, RANK)
    state = remembered = count = 0
    if slots:
        state = f.word(frame, MEMO_STATE) + previous % slots * 16
        remembered = f.word(frame, MEMO) + previous % slots * padded * 4
        count = atomic_load(state + 8)
        if count % 2 == 0 and atomic_load(state) == previous:
            _add(base, floats_at(remembered, padded), own)
            if atomic_load(state + 8) == count:
                return
    _product(frame, floats_at(f.word(frame, W1) + previous * rank * 4, rank), room)
    _add(base, room, own)
    if slots and count % 2 == 0 and exchange_if(state + 8, count, count + 1):
        floats_at(remembered, padded)[:] = room
        atomic_store(state, previous)
        atomic_store(state + 8, count + 2)


@native
def fill_memo(frame):
    """Remember the biases of as many tokens as there are slots, the first ones."""
    slots, rank = f.word(frame, MEMO_SLOTS), f.word(frame, RANK)
    padded = f.word(frame, PANEL_COUNT) * PANEL
    for token in range(min(slots, f.word(frame, W1_ROWS))):
        state = f.word(frame, MEMO_STATE) + token * 16
        features = floats_at(f.word(frame, W1) + token * rank * 4, rank)
        _product(frame, features, floats_at(f.word(frame, MEMO) + token * padded * 4, padded))
        atomic_store(state, token)


@native
def _confidence(frame, h, previous):
    """σ(b + w · [h; W1[x]]), or of h alone."""
    size, inputs, rank = f.word(frame, HIDDEN_SIZE), f.word(frame, CONFIDENCE_INPUTS), f.word(frame, RANK)
    weight = floats_at(f.word(frame, CONFIDENCE_WEIGHT), inputs)
    score = floats_at(f.word(frame, CONFIDENCE_BIAS), 1)[0] + dot(weight[:size], h)
    if inputs > size:
        score += dot(weight[size:], floats_at(f.word(frame, W1) + previous * rank * 4, rank))
    return sigmoid(score)


@native
def sample_blocks(frame):
    """All requests that this thread claims, each a block from left to right."""
    counters = f.word(frame, 0)
    count, block, width = f.word(frame, COUNT), f.word(frame, BLOCK), f.word(frame, WIDTH)
    vocabulary, size, rank, kind = (
        f.word(frame, VOCABULARY), f.word(frame, HIDDEN_SIZE), f.word(frame, RANK), f.word(frame, KIND),
    )  # fmt: skip
    base = floats3_at(f.word(frame, BASE), count, block, width)
    hidden = floats3_at(f.word(frame, HIDDEN), count, block, size)
    ids = wholes_at(f.word(frame, IDS), f.word(frame, ID_COUNT))
    w1 = floats2_at(f.word(frame, W1), f.word(frame, W1_ROWS), rank)
    mix = floats2_at(f.word(frame, MIX), f.word(frame, MIX_ROWS), f.word(frame, MIX_COLUMNS))
    mix_bias = floats_at(f.word(frame, MIX_BIAS), f.word(frame, MIX_ROWS))
    temperatures, top_ks = floats_at(f.word(frame, TEMPERATURE), count), wholes_at(f.word(frame, TOP_K), count)
    top_ps, min_ps = floats_at(f.word(frame, TOP_P), count), floats_at(f.word(frame, MIN_P), count)
    seeds, coupled = wholes_at(f.word(frame, SEED), count), bytes_at(f.word(frame, COUPLED), count)
    positions, proposals = wholes_at(f.word(frame, POSITIONS), count), wholes_at(f.word(frame, PROPOSALS), count)
    tokens, log_z = wholes2_at(f.word(frame, TOKENS), count, block), floats2_at(f.word(frame, LOG_Z), count, block)
    logits = floats3_at(f.word(frame, LOGITS), f.word(frame, LOGIT_ROWS), block, vocabulary)
    confidence = floats2_at(f.word(frame, CONFIDENCE), f.word(frame, CONFIDENCE_ROWS), block)
    weights, scratch = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32)
    masses = np.empty((vocabulary + MASS - 1) // MASS, np.float64)
    narrow, room = np.empty(ids.shape[0], np.float32), np.empty(f.word(frame, PANEL_COUNT) * PANEL, np.float32)
    state, latent = np.empty(rank, np.float32), np.empty(rank, np.float32)
    inputs = np.empty(mix.shape[1], np.float32)
    done, i = 0, claim(counters, 0, -1)
    while i < count:
        state[:] = 0.0
        previous, temperature = f.word(f.word(frame, ANCHORS), i), temperatures[i]
        kept = temperature > 0 and coupled[i] == 0
        plain = top_ks[i] == 0 and top_ps[i] >= 1.0 and min_ps[i] <= 0.0
        for k in range(block):
            h = hidden[i, k]
            row = logits[i, k] if kept else scratch
            own = narrow if ids.shape[0] > 0 else row
            if confidence.shape[0] > 0:
                confidence[i, k] = _confidence(frame, h, previous)
            if kind == NONE:
                own[:] = base[i, k]
            elif kind == VANILLA:
                _add_vanilla(frame, previous, base[i, k], own, room)
            else:
                if kind == GATED:
                    gated_latent(h, w1[previous], mix, mix_bias, inputs, latent)
                else:
                    recurrent_latent(h, w1[previous], mix, mix_bias, inputs, state, latent)
                _product(frame, latent, room)
                _add(base[i, k], room, own)
            if ids.shape[0] > 0:
                row[:] = -np.inf
                for v in range(ids.shape[0]):
                    row[ids[v]] = narrow[v]
            log_z[i, k] = 0.0
            if temperature <= 0:
                token = first_index(row, row_maximum(row))
            elif kept and plain:
                top = row_maximum(row)
                token = 0
                log_z[i, k] = np.nan
                if np.isfinite(top):
                    total = scaled_exp_row(row, top, temperature, weights, masses)
                    log_z[i, k] = np.log(total)
                    u = uniform(seeds[i], positions[i] + 1 + k, proposals[i], _DRAFT)
                    token = draw_by_mass(weights, masses, total, u)
            elif not scale_row(row, temperature):
                token = 0
                log_z[i, k] = np.nan
            elif coupled[i]:
                filter_row(row, weights, top_ks[i], top_ps[i], min_ps[i], False)
                token = pick(row, seeds[i], positions[i] + 1 + k, _COUPLED)
            else:
                log_z[i, k] = np.log(filter_row(row, weights, top_ks[i], top_ps[i], min_ps[i], True))
                token = draw(weights, uniform(seeds[i], positions[i] + 1 + k, proposals[i], _DRAFT))
            tokens[i, k] = token
            previous = token
        done, i = done + 1, claim(counters, 0, i)
    finish(counters, 0, done, count)
