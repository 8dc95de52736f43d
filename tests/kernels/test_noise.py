"""The published vectors, the same bits from both implementations, and numbers that behave as random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from kernels.jit import entry
from kernels.noise import Purpose, exponential_row, exponential_rows, log_float32, philox_words, pick, uniforms
from kernels.reference import noise as reference
from kernels.reference import verify as reference_verify

ONES = 0xFFFFFFFF
PUBLISHED = [  # Random123's kat_vectors, philox4x32 10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(seed: int) -> int:
    return seed - 2**64 if seed & 2**63 else seed


@entry
def apply_log(x, out):
    for i in range(len(x)):
        out[i] = log_float32(x[i])


@entry
def pick_row(row, seed, position, purpose):
    return pick(row, seed, position, purpose)


@entry
def words_of(seed, position, proposal, purpose, first, out):
    philox_words(seed, position, proposal, purpose, first, out)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words) -> None:
    seed = signed(key[1] << 32 | key[0])
    tensors = [torch.tensor(word) for word in counter]
    assert tuple(int(word) for word in reference.philox(*tensors, torch.tensor(seed))) == words
    out = np.zeros(4, np.uint32)
    words_of(seed, counter[1], counter[2], counter[3], counter[0], out)
    assert tuple(out.tolist()) == words


SEEDS = torch.tensor([0, 5, -77, 2**63 - 1, -(2**63)])
POSITIONS = torch.tensor([3, 0, 2**31 + 5, 9, 2**32 - 1])
PROPOSALS = torch.tensor([0, 1, 4, 2**31, 2**32 - 1])


@pytest.mark.parametrize("purpose", list(Purpose))
@pytest.mark.parametrize("vocabulary", [1, 7, 256, 4101])
def test_both_implementations_give_the_same_bits(purpose: Purpose, vocabulary: int) -> None:
    fast = exponential_rows(SEEDS, POSITIONS, purpose, vocabulary)
    slow = reference.exponential_rows(SEEDS, POSITIONS, purpose, vocabulary)
    assert torch.equal(fast.view(torch.int32), slow.view(torch.int32))
    assert torch.equal(
        uniforms(SEEDS, POSITIONS, PROPOSALS, purpose), reference.uniforms(SEEDS, POSITIONS, PROPOSALS, purpose)
    )


def test_a_seed_is_64_bits_signed_or_not() -> None:
    assert torch.equal(exponential_row(2**64 - 77, 1, 3, 9), exponential_row(-77, 1, 3, 9))
    assert not torch.equal(exponential_row(5, 1, 3, 9), exponential_row(5 + 2**32, 1, 3, 9))


def test_every_part_of_the_key_matters() -> None:
    def draw(seed: int = 1, position: int = 2, proposal: int = 3, purpose: Purpose = Purpose.DRAFT) -> float:
        return float(uniforms(torch.tensor([seed]), torch.tensor([position]), torch.tensor([proposal]), purpose))

    values = [draw(), draw(seed=2), draw(position=3), draw(proposal=4)]
    values += [draw(purpose=purpose) for purpose in (Purpose.ACCEPT, Purpose.RESIDUAL, Purpose.COUPLED)]
    assert len(set(values)) == len(values)


def test_uniforms_are_uniform_and_independent_across_purposes() -> None:
    count = 20_000
    seeds, zeros = torch.arange(count) * 7919, torch.zeros(count, dtype=torch.int64)
    columns = [uniforms(seeds, zeros + 11, zeros + 2, purpose).numpy() for purpose in Purpose]
    for column in columns:
        assert 0 < column.min() < column.max() < 1
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    for i in range(len(columns)):
        for j in range(i):
            table = np.histogram2d(columns[i], columns[j], bins=8)[0]
            assert stats.chi2_contingency(table).pvalue > 1e-3


def test_exponentials_are_exponential_and_never_zero() -> None:
    row = exponential_row(123, 4, Purpose.COUPLED, 50_000).numpy()
    assert row.min() > 0
    assert stats.kstest(row, "expon").pvalue > 1e-3
    extremes = reference.exponential_from_bits(torch.tensor([0, 1, 2**30, 2**31, ONES - 1, ONES]))
    exact = -np.log((np.array([0, 1, 2**30, 2**31, ONES - 1, ONES]) + 0.5) / 2**32)
    np.testing.assert_allclose(extremes.numpy(), exact, rtol=3e-7)


def test_logarithm_is_accurate_to_two_units_in_the_last_place() -> None:
    x = np.concatenate([np.geomspace(1e-10, 30, 40_000), 1 + np.linspace(-0.3, 0.3, 40_000)]).astype(np.float32)
    out = np.empty_like(x)
    apply_log(x, out)
    exact = np.log(x.astype(np.float64))
    assert np.all(np.abs(out - exact) <= 2 * np.spacing(np.abs(exact).astype(np.float32)))
    assert np.array_equal(out, reference.log_float32(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 60.0])
def test_skipping_chunks_never_changes_the_pick(spread: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for position in range(20):
        row = torch.randn(1, 3001, generator=generator) * spread
        row[0, ::7] = float("-inf")
        row -= row.max()
        noise = reference.exponential_rows(torch.tensor([99]), torch.tensor([position]), Purpose.COUPLED, 3001)
        expected = int(reference_verify.pick(row, noise)[0])
        assert pick_row(row[0].numpy(), 99, position, int(Purpose.COUPLED)) == expected
