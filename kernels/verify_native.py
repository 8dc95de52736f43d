"""Verification in native code: one sequence after the other, claimed by threads."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import numpy as np

from kernels import layer_frame as f
from kernels.arrays import bytes_at, doubles_at, floats2_at, floats3_at, floats_at, wholes2_at, wholes_at
from kernels.filters import filter_row, scale_row
from kernels.jit import native
from kernels.noise import Purpose, pick, uniform
from kernels.simd import never_inline
from kernels.threads import claim, finish
from kernels.vector import (
    MASS,
    draw,
    draw_by_mass,
    exp_float32,
    first_index,
    row_maximum,
    scaled_exp_row,
    total_weight,
)

# Words of the frame; the first is the counters'.
COUNT, ROWS, VOCABULARY, LOGITS, OFFSETS, LENGTHS, TOKENS, TOKEN_ROWS, BLOCK = range(1, 10)
DRAFT_LOGITS, DRAFT_ROW_COUNT, DRAFT_BLOCK, DRAFT_LOG_Z, DRAFT_ROWS = range(10, 15)
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, COUPLED, POSITIONS, PROPOSALS = range(15, 23)
ACCEPTED, NEXT_TOKEN, FAILED, CERTAINTY = range(23, 27)
WORDS = 27
_ACCEPT, _RESIDUAL, _COUPLED = int(Purpose.ACCEPT), int(Purpose.RESIDUAL), int(Purpose.COUPLED)


@native
def verify_rows(frame):
    """All sequences that this thread claims."""
    counters, count, vocabulary = f.word(frame, 0), f.word(frame, COUNT), f.word(frame, VOCABULARY)
    logits = floats2_at(f.word(frame, LOGITS), f.word(frame, ROWS), vocabulary)
    weights, residual = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32)
    masses = np.empty((vocabulary + MASS - 1) // MASS, np.float64)
    done, i = 0, claim(counters, 0, -1)
    while i < count:
        _verify_sequence(frame, i, logits, weights, residual, masses)
        done, i = done + 1, claim(counters, 0, i)
    finish(counters, 0, done, count)


@native
def _verify_sequence(frame, i, logits, weights, residual, masses):
    never_inline()
    vocabulary, count = f.word(frame, VOCABULARY), f.word(frame, COUNT)
    first, length = f.word(f.word(frame, OFFSETS), i), f.word(f.word(frame, LENGTHS), i)
    tokens = wholes2_at(f.word(frame, TOKENS), f.word(frame, TOKEN_ROWS), f.word(frame, BLOCK))
    held, block = f.word(frame, DRAFT_ROW_COUNT), f.word(frame, DRAFT_BLOCK)
    draft_logits = floats3_at(f.word(frame, DRAFT_LOGITS), held, block, vocabulary)
    draft_log_z = floats2_at(f.word(frame, DRAFT_LOG_Z), held, block)
    temperature = floats_at(f.word(frame, TEMPERATURE), count)[i]
    top_k = f.word(f.word(frame, TOP_K), i)
    top_p, min_p = floats_at(f.word(frame, TOP_P), count)[i], floats_at(f.word(frame, MIN_P), count)[i]
    seed, coupled = f.word(f.word(frame, SEED), i), bytes_at(f.word(frame, COUPLED), count)[i] != 0
    start, proposal = f.word(f.word(frame, POSITIONS), i), f.word(f.word(frame, PROPOSALS), i)
    accepted, chosen = wholes_at(f.word(frame, ACCEPTED), count), wholes_at(f.word(frame, NEXT_TOKEN), count)
    failed, certainty = bytes_at(f.word(frame, FAILED), count), doubles_at(f.word(frame, CERTAINTY), count)
    d = f.word(f.word(frame, DRAFT_ROWS), i)
    for k in range(length + 1):
        row = logits[first + k]
        drafted = tokens[d, k] if k < length else -1
        position = start + k
        if temperature <= 0:
            top = row_maximum(row)
            failed[i] = not np.isfinite(top)
            token = first_index(row, top)
        elif coupled:
            failed[i] = not scale_row(row, temperature)
            token = -1
            if not failed[i]:
                filter_row(row, weights, top_k, top_p, min_p, False)
                token = pick(row, seed, position, _COUPLED)
        else:
            total = _weigh(row, temperature, top_k, top_p, min_p, weights, masses)
            failed[i], token = total <= 0.0, drafted
            if failed[i]:
                break
            if k == 0:
                certainty[i] = 1.0 / total  # the largest weight is 1
            u = uniform(seed, position, proposal, _RESIDUAL)
            if drafted < 0 or d >= held:
                plain = top_k == 0 and top_p >= 1.0 and min_p <= 0.0
                token = draw_by_mass(weights, masses, total, u) if plain else draw(weights, u)
            else:
                log_z = draft_log_z[d, k]
                p_draft = _probability(draft_logits[d, k, drafted], log_z)
                if not uniform(seed, position, proposal, _ACCEPT) * p_draft < weights[drafted] / total:
                    left = weights
                    if np.isfinite(log_z):
                        left = residual
                        _residual(weights, total, draft_logits[d, k], log_z, residual)
                    chosen[i] = draw(left, u)
                    break
        if failed[i]:
            break
        if token != drafted:
            chosen[i] = token
            break
        accepted[i] += 1


@native
def _weigh(row, temperature, top_k, top_p, min_p, weights, masses):
    """weights = exp of the row as it is sampled -> their sum, 0 of a broken row; masses too, where nothing filters."""
    if top_k == 0 and top_p >= 1.0 and min_p <= 0.0:
        top = row_maximum(row)
        return scaled_exp_row(row, top, temperature, weights, masses) if np.isfinite(top) else 0.0
    return filter_row(row, weights, top_k, top_p, min_p, True) if scale_row(row, temperature) else 0.0


@native
def _probability(logit, log_z):
    return np.float64(exp_float32(logit)) * np.exp(-np.float64(log_z))


@native
def _residual(weights, total, draft_row, log_z, residual):
    """residual = max(p_t − p_d, 0) with p_t = weights / total. Where rounding leaves nothing, all weight goes to the
    possible token with the largest difference. Nothing is fused: equal distributions must cancel exactly."""
    scale_target = np.float32(1.0 / total)
    scale_draft = np.float32(np.exp(-np.float64(log_z)))
    for v in range(weights.shape[0]):
        difference = weights[v] * scale_target - exp_float32(draft_row[v]) * scale_draft
        residual[v] = difference if difference > 0.0 else np.float32(0.0)
    if total_weight(residual) > 0.0:
        return
    nearest, largest = 0, np.float32(-np.inf)
    for v in range(weights.shape[0]):
        if weights[v] > 0.0:
            difference = weights[v] * scale_target - exp_float32(draft_row[v]) * scale_draft
            if difference > largest:
                nearest, largest = v, difference
    residual[nearest] = 1.0
