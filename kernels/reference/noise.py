"""Counter-based noise in plain torch, on any device: the definition that every backend reproduces bit for bit.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). 32-bit words are carried in
int64 tensors, whose wrapped products still hold the low and, after a masked shift, the high word.
The float part uses only correctly rounded single operations (no fused multiply-add), so it has one answer.
"""

from __future__ import annotations

import torch

MASK = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
LOG_COEFFICIENTS = (  # Cephes logf: log(1+f) = f − f²/2 + f³·P(f) on [√½ − 1, √2 − 1]
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3
QUARTER = 1 << 30


def philox(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, seeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random 32-bit words (int64 tensors) for every counter; arguments broadcast, `seeds` are 64 bits."""
    k0, k1 = seeds & MASK, (seeds >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        h0, h1 = (p0 >> 32) & MASK, (p1 >> 32) & MASK
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, p1 & MASK, h0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def _log1p_polynomial(f: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(f, LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        y = y * f + coefficient
    square = f * f
    y = (y * f) * square
    y = y + e * LN2_LOW
    y = y - square * 0.5
    return (f + y) + e * LN2_HIGH


def log_float32(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive, normal float32 numbers, within 2 units in the last place."""
    shifted = x.view(torch.int32) - SQRT_HALF_BITS
    mantissa = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    return _log1p_polynomial(mantissa - 1.0, (shifted >> 23).float())


def exponential_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """E = −log((bits + ½)·2⁻³²) in float32 from 32-bit words, as precise near 0 (2⁻³³) as near its maximum, 22.9."""
    u = (bits.float() + 0.5) * 2.0**-32
    complement = MASK - bits
    near_one = complement < QUARTER
    shifted = u.view(torch.int32) - SQRT_HALF_BITS
    mantissa = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    f = torch.where(near_one, (complement.float() + 0.5) * -(2.0**-32), mantissa - 1.0)
    e = torch.where(near_one, 0, shifted >> 23).float()
    return -_log1p_polynomial(f, e)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor, proposals: torch.Tensor, purpose: int) -> torch.Tensor:
    """Same as `kernels.noise.uniforms`."""
    zero = torch.zeros_like(positions)
    a, b, _, _ = philox(zero, positions & MASK, proposals & MASK, zero + int(purpose), seeds)
    return (((a >> 6) * 2**26 + (b >> 6)).double() + 0.5) * 2.0**-52


def exponential_rows(seeds: torch.Tensor, positions: torch.Tensor, purpose: int, vocabulary: int) -> torch.Tensor:
    """Same as `kernels.noise.exponential_rows`."""
    block = torch.arange((vocabulary + 3) // 4, device=seeds.device)
    zero = torch.zeros_like(block)
    words = philox(block, (positions & MASK)[:, None] + zero, zero, zero + int(purpose), seeds[:, None])
    return exponential_from_bits(torch.stack(words, -1).flatten(1)[:, :vocabulary])
