"""The noise of `kernels.noise` on a device: the same bits. To be compiled unfused (`launch.UNFUSED`)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.reference import noise as reference
from kernels.triton.launch import UNFUSED

BLOCK = 1024

_SQRT_HALF = tl.constexpr(reference.SQRT_HALF_BITS)
_LN2_HIGH, _LN2_LOW = tl.constexpr(reference.LN2_HIGH), tl.constexpr(reference.LN2_LOW)
_P = [tl.constexpr(coefficient) for coefficient in reference.LOG_COEFFICIENTS]
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8 = _P
_QUARTER = tl.constexpr(reference.QUARTER)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor, proposals: torch.Tensor, purpose: int) -> torch.Tensor:
    """Same as `kernels.noise.uniforms`."""
    out = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
    if len(seeds):
        _uniforms[(len(seeds),)](seeds, positions, proposals, out, int(purpose), num_warps=1, **UNFUSED)
    return out


def exponential_rows(seeds: torch.Tensor, positions: torch.Tensor, purpose: int, vocabulary: int) -> torch.Tensor:
    """Same as `kernels.noise.exponential_rows`."""
    out = torch.empty((len(seeds), vocabulary), dtype=torch.float32, device=seeds.device)
    if out.numel():
        grid = (len(seeds), triton.cdiv(vocabulary, BLOCK))
        _exponentials[grid](seeds, positions, out, int(purpose), vocabulary, TILE=BLOCK, num_warps=4, **UNFUSED)
    return out


@triton.jit
def uniform(seed, position, proposal, purpose):
    """One number of `uniforms`, float64; seed, position and proposal int64."""
    zero = (position * 0).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, zero, position.to(tl.uint32), proposal.to(tl.uint32), zero + purpose)
    bits = ((a >> 6).to(tl.int64) << 26) | (b >> 6).to(tl.int64)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2⁻⁵²


@triton.jit
def words(seed, position, purpose, start, TILE: tl.constexpr):
    """The words uint32 [TILE] of tokens start … start + TILE − 1; start is a multiple of 4."""
    block = (start // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    zero = tl.zeros_like(block)
    a, b, c, d = tl.philox(seed, block, zero + position.to(tl.uint32), zero, zero + purpose)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _log1p_polynomial(f, e):
    y = tl.zeros_like(f) + _P0
    y = y * f + _P1
    y = y * f + _P2
    y = y * f + _P3
    y = y * f + _P4
    y = y * f + _P5
    y = y * f + _P6
    y = y * f + _P7
    y = y * f + _P8
    square = f * f
    y = (y * f) * square
    y = y + e * _LN2_LOW
    y = y - square * 0.5
    return (f + y) + e * _LN2_HIGH


@triton.jit
def log_float32(x):
    """Natural logarithm of positive, normal float32 numbers: `kernels.noise.log_float32` bit for bit."""
    shifted = x.to(tl.int32, bitcast=True) - _SQRT_HALF
    mantissa = ((shifted & 0x7FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True)
    return _log1p_polynomial(mantissa - 1.0, (shifted >> 23).to(tl.float32))


@triton.jit
def exponential_from_bits(bits):
    """E = −log((bits + ½)·2⁻³²) of uint32 words, as `kernels.noise` defines it."""
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2⁻³²
    complement = bits ^ 0xFFFFFFFF
    near_one = complement < _QUARTER
    shifted = u.to(tl.int32, bitcast=True) - _SQRT_HALF
    mantissa = ((shifted & 0x7FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True)
    f = tl.where(near_one, (complement.to(tl.float32) + 0.5) * -2.3283064365386963e-10, mantissa - 1.0)
    e = tl.where(near_one, 0, shifted >> 23).to(tl.float32)
    return -_log1p_polynomial(f, e)


@triton.jit
def exp_float32(x):
    """exp(x) for x ≤ 0 within 3 units in the last place, exactly 0 below −88: `kernels.vector.exp_float32` unfused."""
    y = tl.maximum(x, -88.0)
    shifted = y * 1.44269504 + 12582912.0  # adding 1.5 · 2²³ rounds to an integer
    n = shifted - 12582912.0
    r = (y - n * 0.693359375) - n * -2.12194440e-4
    p = ((((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2) * r) + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    scale = ((shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23).to(tl.float32, bitcast=True)
    return (p * (r * r) + r + 1.0) * scale


@triton.jit
def _uniforms(seeds, positions, proposals, out, purpose):
    i = tl.program_id(0)
    tl.store(out + i, uniform(tl.load(seeds + i), tl.load(positions + i), tl.load(proposals + i), purpose))


@triton.jit
def _exponentials(seeds, positions, out, purpose, vocabulary, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    token = start + tl.arange(0, TILE)
    noise = exponential_from_bits(words(tl.load(seeds + row), tl.load(positions + row), purpose, start, TILE))
    tl.store(out + row * vocabulary + token, noise, token < vocabulary)
