"""The device's noise: the published vectors, and the bits of the definition."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.noise import Purpose
from kernels.reference import noise as reference
from kernels.triton import noise as device
from kernels.triton.launch import UNFUSED
from tests.kernels.test_noise import POSITIONS, PROPOSALS, PUBLISHED, SEEDS, signed
from tests.kernels.triton.cases import DEVICE


@triton.jit
def words_of(seed, counter, out):
    zero = tl.arange(0, 1).to(tl.uint32)
    c0, c1 = zero + tl.load(counter).to(tl.uint32), zero + tl.load(counter + 1).to(tl.uint32)
    c2, c3 = zero + tl.load(counter + 2).to(tl.uint32), zero + tl.load(counter + 3).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), c0, c1, c2, c3)
    at = out + tl.arange(0, 1)
    tl.store(at, a.to(tl.int64))
    tl.store(at + 1, b.to(tl.int64))
    tl.store(at + 2, c.to(tl.int64))
    tl.store(at + 3, d.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words) -> None:
    seed = torch.tensor([signed(key[1] << 32 | key[0])], device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    words_of[(1,)](seed, torch.tensor(counter, device=DEVICE), out, **UNFUSED)
    assert tuple(out.tolist()) == words


@pytest.mark.parametrize("vocabulary", [1, 7, 4101])
def test_the_definitions_bits(vocabulary: int) -> None:
    seeds, positions, proposals = (value.to(DEVICE) for value in (SEEDS, POSITIONS, PROPOSALS))
    fast = device.exponential_rows(seeds, positions, Purpose.COUPLED, vocabulary)
    slow = reference.exponential_rows(seeds, positions, Purpose.COUPLED, vocabulary)
    assert torch.equal(fast.view(torch.int32), slow.view(torch.int32))
    for purpose in Purpose:
        assert torch.equal(
            device.uniforms(seeds, positions, proposals, purpose),
            reference.uniforms(seeds, positions, proposals, purpose),
        )


@triton.jit
def apply(x, log, exp, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at)
    tl.store(log + at, device.log_float32(value))
    tl.store(exp + at, device.exp_float32(-value))


def test_logarithm_has_the_definitions_bits_and_exp_is_accurate() -> None:
    x = torch.logspace(-10, 1.95, 8192, dtype=torch.float64).float().to(DEVICE)
    log, exp = torch.empty_like(x), torch.empty_like(x)
    apply[(8,)](x, log, exp, TILE=1024, **UNFUSED)
    assert torch.equal(log, reference.log_float32(x))
    exact = (-x.double()).exp()
    inside = x < 87
    assert bool(((exp - exact).abs()[inside] <= 3 * 2.0**-24 * exact[inside] * 2).all())
    assert bool((exp[x > 88.1] == 0).all())
