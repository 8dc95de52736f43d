"""Matrix products: parity with torch, and rows that do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import threads
from kernels.amx import HAS_TILES
from kernels.matmul import matmul, pack
from kernels.reference.matmul import matmul as reference
from kernels.reference.rms_norm import rms_norm as reference_norm
from kernels.rms_norm import rms_norm
from kernels.values import FULL, HALVED, PAIRED, TILED, PackedMatrix
from tests.kernels.layers import same_bits


def weight_of(n: int, k: int, sixteen_bit: bool) -> torch.Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    return weight.bfloat16().float() if sixteen_bit else weight


@pytest.mark.parametrize("sixteen_bit", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 7), (32, 64), (100, 33), (160, 192), (257, 80)])
def test_every_row_count_matches_torch(n: int, k: int, sixteen_bit: bool) -> None:
    weight = weight_of(n, k, sixteen_bit)
    packed = pack(weight)
    assert packed.form == (HALVED if sixteen_bit else FULL)
    assert torch.equal(packed.dense(), weight)
    for rows in range(1, 41):
        x = torch.randn(rows, k)
        torch.testing.assert_close(matmul(x, packed), x @ weight.T, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("sixteen_bit", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(sixteen_bit: bool) -> None:
    packed = pack(weight_of(200, 96, sixteen_bit))
    x = torch.randn(40, 96)
    alone = torch.cat([matmul(x[row : row + 1], packed) for row in range(40)])
    for rows in range(1, 41):
        assert same_bits(matmul(x[:rows].contiguous(), packed), alone[:rows])
    assert same_bits(matmul(x.flip(0).contiguous(), packed), alone.flip(0))


def test_sixteen_bit_panels_change_no_bit() -> None:
    weight = weight_of(96, 64, True)
    nudged = weight.clone()
    nudged[0, 0] += 2**-20  # no bfloat16 any more: 32-bit panels
    assert pack(nudged).form == FULL
    x = torch.randn(5, 64)
    assert same_bits(matmul(x, pack(weight))[:, 1:], matmul(x, pack(nudged))[:, 1:])


BFLOAT_SHAPES = [(1, 1), (31, 7), (32, 64), (100, 33), (160, 192), (257, 80)]


def bfloat_panels(n: int, k: int, form: int) -> tuple[torch.Tensor, PackedMatrix]:
    weight = weight_of(n, k, True)
    packed = pack(weight.bfloat16())
    assert packed.form == (TILED if HAS_TILES and k % 32 == 0 else PAIRED)
    assert torch.equal(packed.dense(), weight)
    return weight, replace(packed, form=form)


@pytest.mark.parametrize(("n", "k"), BFLOAT_SHAPES)
def test_bfloat16_factors_have_exact_products_and_float32_sums(n: int, k: int) -> None:
    weight, packed = bfloat_panels(n, k, PAIRED)
    x = torch.randn(40, k)
    rounded = x.bfloat16().double()
    # In each pair of neighbours the second product is added first.
    order = [j for i in range(0, k, 2) for j in (i + 1, i) if j < k]
    sums = torch.zeros(40, n)
    for j in order:
        sums = (sums.double() + rounded[:, j : j + 1] * weight[:, j].double()).float()
    for rows in range(1, 41):
        assert same_bits(matmul(x[:rows], packed), sums[:rows])
    torch.testing.assert_close(sums, reference(x, packed), atol=2e-4, rtol=1e-4)


@pytest.mark.skipif(not HAS_TILES, reason="this processor, or this system, has no AMX")
@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 64), (32, 64), (160, 192), (257, 96)])
def test_matrix_tiles_have_exact_products_and_float32_sums(n: int, k: int) -> None:
    """Of each 32 products those at even and at odd places are added up apart, then both sums to what was there."""
    weight, packed = bfloat_panels(n, k, TILED)
    x = torch.randn(70, k)
    rounded, exact = x.bfloat16().double(), weight.double()
    sums = torch.zeros(70, n)
    for start in range(0, k, 32):
        halves = torch.zeros(2, 70, n)
        for j in range(32):
            product = rounded[:, start + j, None] * exact[:, start + j]
            halves[j % 2] = (halves[j % 2].double() + product).float()
        sums += halves[0] + halves[1]
    for rows in range(1, 71):
        assert same_bits(matmul(x[:rows], packed), sums[:rows])
    torch.testing.assert_close(sums, reference(x, packed), atol=2e-4, rtol=1e-4)


def test_threads_change_no_bit(three_threads: None) -> None:
    packed = pack(weight_of(1000, 64, True))
    x = torch.randn(9, 64)
    many = [matmul(x, packed) for _ in range(20)]
    threads.set_threads(1)
    one = matmul(x, packed)
    assert all(same_bits(result, one) for result in many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    packed = pack(weight_of(64, 32, False).to(dtype))
    x = torch.randn(6, 32)
    clean = matmul(x, packed)
    x[2, 3] = torch.nan
    dirty = matmul(x, packed)
    assert dirty[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert same_bits(dirty[others], clean[others])


def test_other_dtypes_use_torch() -> None:
    weight = torch.randn(48, 32, dtype=torch.bfloat16)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(matmul(x, pack(weight)), reference(x, pack(weight)))


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="columns"):
        matmul(torch.randn(2, 31), pack(torch.randn(8, 32)))


@pytest.mark.parametrize("width", [1, 16, 33, 64, 250])
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(7, width), torch.rand(width)
    got = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, reference_norm(x, weight, 1e-6), atol=1e-6, rtol=1e-5)
    assert same_bits(got[3:4], rms_norm(x[3:4], weight, 1e-6))
