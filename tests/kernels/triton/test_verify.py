"""Filters and verification on a device: the decisions of the reference, ties, failures, and rows that stand alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.filters import SamplingRows
from kernels.reference import filters as reference_filters
from kernels.reference import verify as reference
from kernels.triton import filters, verify
from tests.kernels import test_verify as cases
from tests.kernels.triton.cases import DEVICE

INF = float("inf")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, tiles and search tiles already in a row of 101."""
    for module, sizes in ((verify, (64, 32, 128)), (filters, (None, 32, 128))):
        for name, size in zip(("SEGMENT", "BLOCK", "SEARCH"), sizes, strict=True):
            if size:
                monkeypatch.setattr(module, name, size)


def moved(value):
    if isinstance(value, SamplingRows):
        fields = ("temperature", "top_k", "top_p", "min_p", "seed", "coupled")
        return SamplingRows(*(getattr(value, name).to(DEVICE) for name in fields))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def run(logits: torch.Tensor, *rest) -> tuple[torch.Tensor, ...]:
    return tuple(out.cpu() for out in verify.verify(moved(logits.clone()), *(moved(value) for value in rest)))


def test_filters_keep_what_sorting_keeps() -> None:
    count, vocabulary = 11, 101
    choose = np.random.default_rng(3).choice
    options = SamplingRows.build(
        choose([0, 0.001, 1, 2.5], count),
        choose([0, 1, 5, 64, vocabulary - 1, vocabulary, vocabulary + 5], count),
        choose([1, 0.9, 0.5, 1e-9, 0], count),
        choose([0, 0.01, 0.3, 1], count),
        [0] * count,
        [False] * count,
    )
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(2)) * 5
    logits[::3] = (logits[::3] * 2).round() / 2  # many ties
    logits[5, 1:] = -INF
    logits[7, vocabulary // 2 :] = -INF
    logits[8, 3], logits[9], logits[10, 99] = float("nan"), -INF, INF
    fast, slow = moved(logits), logits.clone()
    fast_z, slow_z = filters.filter_logits_(fast, moved(options)).cpu(), reference_filters.filter_logits_(slow, options)
    whole = list(range(8))
    assert torch.equal(fast.cpu()[whole], slow[whole])
    torch.testing.assert_close(fast_z[whole], slow_z[whole], rtol=1e-5, atol=1e-5)
    assert fast_z[8:11].isnan().all()


def mixed_case(seed: int, count: int = 8, vocabulary: int = 101, block: int = 4) -> list:
    """Greedy, rejection and coupled sequences; of eight three are filtered: searching is slow under the interpreter."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    lengths, rows = integers(block + 1), torch.randperm(count, generator=generator)
    offsets = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
    times = -(-count // 8)
    sampling = SamplingRows.build(
        ([0, 0, 1, 0.5, 1.7, 1, 1, 1] * times)[:count],
        ([3, 0, 0, 0, 0, 0, 5, 70] * times)[:count],
        ([1, 1, 1, 1, 1, 0.9, 0.8, 1] * times)[:count],
        ([0, 0, 0, 0, 0, 0, 0.05, 0] * times)[:count],
        (integers(2**62) - 2**61).tolist(),
        ([False, True] * count)[:count],
    )
    logits = torch.randn(int(offsets[-1]), vocabulary, generator=generator) * 3
    draft = torch.randn(count, block, vocabulary, generator=generator)
    for i in range(count):  # near the target's rows
        used = slice(int(offsets[i]), int(offsets[i] + lengths[i]))
        draft[rows[i], : lengths[i]] = logits[used] + 0.5 * draft[rows[i], : lengths[i]]
    flat = draft.view(-1, vocabulary)
    log_z = reference_filters.filter_logits_(flat, sampling.take(rows.argsort().repeat_interleave(block)))
    tokens = (flat - log_z[:, None]).exp().multinomial(1, generator=generator)
    shape = (count, block)
    return [
        logits, offsets, tokens.view(shape), lengths, draft, log_z.view(shape), rows, sampling, integers(1000),
        integers(1000),
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_beyond_the_draft_logits_are_guesses(rows: int) -> None:
    logits, *rest = cases.some_guessed(mixed_case(7), rows)
    for fast, slow in zip(run(logits, *rest), reference.verify(logits.clone(), *rest), strict=True):
        assert torch.equal(fast, slow)


def unfiltered(count: int, coupled: bool, temperature: float = 1.0) -> SamplingRows:
    return cases.options(count, coupled=coupled, temperature=temperature)


def plain(logits: torch.Tensor, sampling: SamplingRows) -> list:
    """One row a sequence, nothing drafted."""
    count = len(logits)
    none, zeros = torch.zeros((count, 0), dtype=torch.int64), cases.full(count, 0)
    return [logits, torch.arange(count + 1), none, zeros, None, None, zeros, sampling, zeros, zeros]


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e-30, 50.0])
def test_coupled_picks_are_exact(temperature: float) -> None:
    """Whole logits at a small temperature tie: the row is read again."""
    count = 6
    logits = torch.randn(count, 101, generator=torch.Generator().manual_seed(1)) * 4
    logits[::2] = logits[::2].round()
    arguments = plain(logits, unfiltered(count, True, temperature))
    _, expected, _ = reference.verify(logits.clone(), *arguments[1:])
    assert torch.equal(run(*arguments)[1], expected)


def test_logits_of_16_bits_do() -> None:
    logits = (torch.randn(4, 101, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    for coupled in (False, True):
        arguments = plain(logits, unfiltered(4, coupled))
        _, expected, _ = reference.verify(logits.float(), *arguments[1:])
        assert torch.equal(run(*arguments)[1], expected)


def test_a_sequence_depends_on_nothing_but_itself() -> None:
    logits, offsets, tokens, lengths, draft, log_z, rows, sampling, positions, proposals = mixed_case(52)
    together = run(logits, offsets, tokens, lengths, draft, log_z, rows, sampling, positions, proposals)
    for i in (2, 3, 6):
        one = torch.tensor([i])
        alone = run(
            logits[offsets[i] : offsets[i + 1]],
            torch.tensor([0, int(lengths[i]) + 1]),
            tokens,
            lengths[one],
            draft,
            log_z,
            rows[one],
            sampling.take(one),
            positions[one],
            proposals[one],
        )
        assert [int(value[0]) for value in alone] == [int(value[i]) for value in together]


@pytest.mark.parametrize("kind", [{"temperature": 0.0, "coupled": False}, {"coupled": False}, {"coupled": True}])
def test_rows_without_a_distribution_fail_alone(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "verify", run)
    cases.test_rows_without_a_distribution_fail_alone(kind)


def test_edges_of_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disjoint, equal and broken drafts; few seeds, since the interpreter takes them one by one."""
    monkeypatch.setattr(cases, "verify", run)
    monkeypatch.setattr(cases, "filter_logits_", reference_filters.filter_logits_)
    target = torch.tensor([0.3, 1.0, -0.5, 0.0, -INF])
    accepted, chosen, failed = cases.decide(cases.one_hot(2), cases.one_hot(5), 5, coupled=False, count=4)
    assert not failed.any() and (accepted == 0).all() and (chosen == 2).all()
    accepted, chosen, _ = cases.decide(target, target, 1, coupled=False, count=8)
    assert (accepted == 1).all() and (chosen < 4).all()
    accepted, chosen, failed = cases.decide(target, None, 3, coupled=False, count=8)
    assert not failed.any() and (accepted == 0).all() and (chosen < 4).all() and len(chosen.unique()) > 1
    draft = torch.tensor([0.0, 1e-6, -9.0, -INF, 0.0])
    target = torch.tensor([0.0, 0.0, -INF, -INF, 1e-6])
    accepted, chosen, _ = cases.decide(target, draft, 3, coupled=False, count=8)
    assert (accepted == 0).all() and set(chosen.tolist()) <= {0, 1, 4}


def test_greedy_takes_the_lowest_index_of_a_tie() -> None:
    logits = torch.zeros(2, 101)
    logits[0, [40, 70, 100]] = 3.0
    logits[1, [33, 34, 99]] = 2.0
    _, chosen, _ = run(*plain(logits, unfiltered(2, False, temperature=0.0)))
    assert chosen.tolist() == [40, 33]


def test_nothing_to_verify() -> None:
    logits, *rest = plain(torch.zeros(0, 9), unfiltered(0, False))
    assert [len(out) for out in run(logits, *rest)] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="takes minutes under the interpreter")
@pytest.mark.parametrize("vocabulary", [4097, 151_936])
def test_large_vocabularies_in_full_tiles(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("SEGMENT", 8192), ("BLOCK", 2048), ("SEARCH", 512)):
        monkeypatch.setattr(verify, name, size)
    logits, *rest = mixed_case(1, 24, vocabulary)
    for fast, slow in zip(run(logits, *rest), reference.verify(logits.clone(), *rest), strict=True):
        assert torch.equal(fast, slow)
