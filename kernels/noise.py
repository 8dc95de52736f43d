"""Counter-based random numbers: Philox4x32-10, the same bits on every backend, in every batch, in any order.

Key: the request's 64-bit seed. Counter: (token block, position, proposal counter, purpose). A number is thus a
function of what it is for, and nothing is ever drawn twice for two purposes.

Two choices go beyond the obvious, both for exactness at large vocabularies. Uniforms are float64 with 52 random bits:
23 bits would round every token's share of a 262,144-token vocabulary to a few grid steps. Exponentials use
all 32 bits of their word and keep full relative precision near 0, where the winner of a race lies.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

from kernels.device import on_gpu
from kernels.jit import entry, native
from kernels.reference import noise as reference
from kernels.vector import bits_float, first_index, float_bits, ordered, row_maximum


class Purpose(IntEnum):
    """What a number is for: the fourth counter word."""

    DRAFT = 0  # drawing a drafted token
    ACCEPT = 1  # accepting it
    RESIDUAL = 2  # drawing from the residual after a rejection, or the bonus token
    COUPLED = 3  # per-token noise shared by draft and target


def uniforms(seeds: torch.Tensor, positions: torch.Tensor, proposals: torch.Tensor, purpose: int) -> torch.Tensor:
    """One uniform number a row, float64 [N] in (0, 1): (b + ½)·2⁻⁵² with b from the upper 26 bits of two words.

    seeds [N] int64 (all 64 bits count), positions [N] and proposals [N] int64 (taken modulo 2³²).
    """
    if on_gpu(seeds):
        from kernels.triton import noise as device

        return device.uniforms(seeds, positions, proposals, purpose)
    if seeds.device.type != "cpu":
        return reference.uniforms(seeds, positions, proposals, purpose)
    out = np.empty(len(seeds), np.float64)
    _uniforms(seeds.numpy(), positions.numpy(), proposals.numpy(), int(purpose), out)
    return torch.from_numpy(out)


def exponential_rows(seeds: torch.Tensor, positions: torch.Tensor, purpose: int, vocabulary: int) -> torch.Tensor:
    """Unit exponentials, float32 [N, vocabulary]: E = −log((b + ½)·2⁻³²), b the token's word.

    Token v reads lane v mod 4 of the block with counter word v div 4; the proposal counter is 0.
    seeds [N], positions [N] int64. argmax(log p − log E) is a sample of p.
    """
    if on_gpu(seeds):
        from kernels.triton import noise as device

        return device.exponential_rows(seeds, positions, purpose, vocabulary)
    if seeds.device.type != "cpu":
        return reference.exponential_rows(seeds, positions, purpose, vocabulary)
    out = np.empty((len(seeds), vocabulary), np.float32)
    _exponential_rows(seeds.numpy(), positions.numpy(), int(purpose), out)
    return torch.from_numpy(out)


def exponential_row(seed: int, position: int, purpose: int, vocabulary: int) -> torch.Tensor:
    """One row of `exponential_rows` on the CPU, float32 [vocabulary]; `seed` is any 64-bit integer."""
    signed = (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)
    return exponential_rows(torch.tensor([signed]), torch.tensor([position]), purpose, vocabulary)[0]


CHUNK = 256  # tokens whose words are made at once

_MASK = np.uint64(reference.MASK)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(reference.MULTIPLIER_0), np.uint64(reference.MULTIPLIER_1)
_WEYL_0, _WEYL_1 = np.uint64(reference.WEYL_0), np.uint64(reference.WEYL_1)
_32 = np.uint64(32)
_P = tuple(np.float32(coefficient) for coefficient in reference.LOG_COEFFICIENTS)
_LN2_HIGH, _LN2_LOW = np.float32(reference.LN2_HIGH), np.float32(reference.LN2_LOW)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_TO_UNIT, _FROM_ONE = np.float32(2.0**-32), np.float32(-(2.0**-32))
_SQRT_HALF, _FRACTION = np.int32(reference.SQRT_HALF_BITS), np.int32(0x7FFFFF)
_QUARTER = np.uint32(reference.QUARTER)
_WORD = np.uint32(reference.MASK)


@native
def philox_words(seed: int, position: int, proposal: int, purpose: int, first: int, words: np.ndarray) -> None:
    """Fill words uint32 [4·n] with the blocks first … first + n − 1. 64-bit lanes: the products need the room."""
    key_0 = np.uint64(seed) & _MASK
    key_1 = np.uint64(seed) >> _32
    p = np.uint64(position) & _MASK
    q = np.uint64(proposal) & _MASK
    for j in range(words.shape[0] // 4):
        c0, c1, c2, c3 = np.uint64(first + j), p, q, np.uint64(purpose)
        k0, k1 = key_0, key_1
        for _ in range(10):
            p0 = (c0 & _MASK) * _MULTIPLIER_0
            p1 = (c2 & _MASK) * _MULTIPLIER_1
            c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1, (p0 >> _32) ^ c3 ^ k1, p0
            k0, k1 = k0 + _WEYL_0, k1 + _WEYL_1
        words[4 * j] = np.uint32(c0)
        words[4 * j + 1] = np.uint32(c1)
        words[4 * j + 2] = np.uint32(c2)
        words[4 * j + 3] = np.uint32(c3)


@native
def _log1p_polynomial(f: np.float32, e: np.float32) -> np.float32:
    y = _P[0]
    y = y * f + _P[1]
    y = y * f + _P[2]
    y = y * f + _P[3]
    y = y * f + _P[4]
    y = y * f + _P[5]
    y = y * f + _P[6]
    y = y * f + _P[7]
    y = y * f + _P[8]
    square = f * f
    y = (y * f) * square
    y = y + e * _LN2_LOW
    y = y - square * _HALF
    return (f + y) + e * _LN2_HIGH


@native
def log_float32(x: np.float32) -> np.float32:
    """Natural logarithm of a positive, normal float32, within 2 units in the last place."""
    shifted = np.int32(float_bits(x) - _SQRT_HALF)
    mantissa = bits_float(np.int32((shifted & _FRACTION) + _SQRT_HALF))
    return _log1p_polynomial(mantissa - _ONE, np.float32(shifted >> np.int32(23)))


@native
def exponential_from_bits(bits: np.uint32) -> np.float32:
    """E = −log((bits + ½)·2⁻³²), precise at both ends: 2⁻³³ … 22.9."""
    complement = np.uint32(bits ^ _WORD)
    shifted = np.int32(float_bits((np.float32(bits) + _HALF) * _TO_UNIT) - _SQRT_HALF)
    mantissa = bits_float(np.int32((shifted & _FRACTION) + _SQRT_HALF))
    near_one = complement < _QUARTER
    f = (np.float32(complement) + _HALF) * _FROM_ONE if near_one else mantissa - _ONE
    e = np.float32(0.0) if near_one else np.float32(shifted >> np.int32(23))
    return -_log1p_polynomial(f, e)


@native
def uniform(seed: int, position: int, proposal: int, purpose: int) -> float:
    """One number of `uniforms`."""
    words = np.empty(4, np.uint32)
    philox_words(seed, position, proposal, purpose, 0, words)
    bits = (np.uint64(words[0]) >> np.uint64(6) << np.uint64(26)) | (np.uint64(words[1]) >> np.uint64(6))
    return (np.float64(bits) + 0.5) * 2.0**-52


@entry
def _uniforms(seeds: np.ndarray, positions: np.ndarray, proposals: np.ndarray, purpose: int, out: np.ndarray) -> None:
    for i in range(out.shape[0]):
        out[i] = uniform(seeds[i], positions[i], proposals[i], purpose)


@entry
def _exponential_rows(seeds: np.ndarray, positions: np.ndarray, purpose: int, out: np.ndarray) -> None:
    words = np.empty(CHUNK, np.uint32)
    vocabulary = out.shape[1]
    for i in range(out.shape[0]):
        for start in range(0, vocabulary, CHUNK):
            philox_words(seeds[i], positions[i], 0, purpose, start // 4, words)
            for v in range(min(CHUNK, vocabulary - start)):
                out[i, start + v] = exponential_from_bits(words[v])


_LARGEST = np.float32(23.0)  # above every −log E
_LOG2_BITS, _LOG2_ONE = np.float32(np.log(2.0) * 2.0**-23), np.float32(np.log(2.0) * 127.0 - 1e-3)


@native
def pick(row: np.ndarray, seed: int, position: int, purpose: int) -> int:
    """argmax(row − log E), the lowest index on ties: a sample of softmax(row) if the float32 row has a finite entry.

    A chunk whose upper bound stays below the best score so far is skipped, which leaves the result as it is:
    log E ≥ log(1 − e^−E) ≥ ln 2 · (exponent + fraction) of that float, so most chunks cost their words and little else.
    """
    words = np.empty(CHUNK, np.uint32)
    scores = np.empty(CHUNK, np.float32)
    best, token = np.float32(-np.inf), 0
    for start in range(0, row.shape[0], CHUNK):
        part = row[start : start + CHUNK]
        size = part.shape[0]
        if row_maximum(part) + _LARGEST < best:
            continue
        philox_words(seed, position, 0, purpose, start // 4, words)
        ceiling = np.int32(-0x80000000)
        for v in range(size):
            small = (np.float32(np.uint32(words[v] ^ _WORD)) + _HALF) * _TO_UNIT
            bound = part[v] - (np.float32(float_bits(small)) * _LOG2_BITS - _LOG2_ONE)
            ceiling = max(ceiling, ordered(bound))
        if ceiling <= ordered(best):
            continue
        for v in range(size):
            scores[v] = part[v] - log_float32(exponential_from_bits(words[v]))
        top = row_maximum(scores[:size])
        if top > best:
            best, token = top, start + first_index(scores[:size], top)
    return token
