"""Temperature and filters against transformers' own processors, and against the sorting reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.filters import SamplingRows, filter_logits_
from kernels.reference import filters as reference

INF = float("inf")


def rows(count: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> SamplingRows:
    def spread(value):
        return list(value) if isinstance(value, list | np.ndarray) else [value] * count

    return SamplingRows.build(
        spread(temperature), spread(top_k), spread(top_p), spread(min_p), [0] * count, [False] * count
    )


def filtered(logits: torch.Tensor, options: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    out = logits.clone()
    return out, filter_logits_(out, options)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    list(itertools.product([0.6, 1.0, 1.7], [0, 1, 20, 100], [1.0, 0.95, 0.3], [0.0, 0.05])),
)
def test_same_distribution_as_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(16, 301, generator=torch.Generator().manual_seed(1)) * 3
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(None, logits.clone()).softmax(-1)
    values, log_z = filtered(logits, rows(16, temperature, top_k, top_p, min_p))
    actual = (values - log_z[:, None]).exp()
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [2, 37, 1001, 4096])
def test_radix_search_equals_sorting(vocabulary: int) -> None:
    count = 200
    choose = np.random.default_rng(vocabulary).choice
    options = rows(
        count,
        choose([0, 0.001, 0.3, 1, 2.5, 50], count),
        choose([0, 1, 2, 5, 64, 65, vocabulary - 1, vocabulary, vocabulary + 5], count),
        choose([1, 0.9, 0.5, 0.99, 0.999, 1e-9, 0], count),
        choose([0, 0.01, 0.3, 1], count),
    )
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(2)) * 5
    logits[::3] = (logits[::3] * 2).round() / 2  # many ties
    logits[5, 1:] = -INF
    logits[7, vocabulary // 2 :] = -INF
    fast, slow = logits.clone(), logits.clone()
    fast_z, slow_z = filter_logits_(fast, options), reference.filter_logits_(slow, options)
    assert torch.equal(fast, slow)
    torch.testing.assert_close(fast_z, slow_z, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]] * 3)
    values, _ = filtered(logits, rows(3, 1.0, [1, 3, 0], [1.0, 1.0, 0.3]))
    assert (values > -INF).tolist() == [
        [False, True, False, False, False],
        [True, True, False, True, False],
        [False, True, False, False, False],  # either 2.0 has mass .36
    ]


def test_greedy_rows_stay_untouched_and_unfiltered_rows_are_only_scaled() -> None:
    logits = torch.randn(2, 50)
    values, log_z = filtered(logits, rows(2, [0.0, 0.5], [3, 0], [0.1, 1.0]))
    assert torch.equal(values[0], logits[0])
    torch.testing.assert_close(log_z[0], logits[0].logsumexp(0))
    assert torch.equal(values[1], (logits[1] - logits[1].max()) / 0.5)


def test_a_row_depends_on_nothing_but_itself() -> None:
    logits = torch.randn(9, 517) * 4
    options = rows(9, [0.7, 1.0, 0.0] * 3, [0, 8, 90] * 3, [0.9, 1.0, 0.95] * 3, [0.0, 0.0, 0.1] * 3)
    together, together_z = filtered(logits, options)
    for i in range(9):
        alone, alone_z = filtered(logits[i : i + 1], options.take(torch.tensor([i])))
        assert torch.equal(alone[0], together[i])
        assert torch.equal(alone_z[0], together_z[i])


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e3])
def test_extreme_temperatures_give_a_distribution(temperature: float) -> None:
    logits = torch.randn(4, 100) * 10
    values, log_z = filtered(logits, rows(4, temperature, 0, 0.9, 0.0))
    p = (values - log_z[:, None]).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(4), rtol=1e-5, atol=0)
    assert torch.equal(p.argmax(-1), logits.argmax(-1))


def test_rows_without_a_distribution_say_nan() -> None:
    logits = torch.randn(4, 100)
    logits[0, 3] = float("nan")
    logits[1] = -INF
    logits[2, 7] = INF
    _, log_z = filtered(logits, rows(4, 1.0, 5, 0.9, 0.1))
    assert log_z.isnan().tolist() == [True, True, True, False]


def test_seeds_of_64_bits_survive() -> None:
    options = SamplingRows.build([1.0] * 2, [0] * 2, [1.0] * 2, [0.0] * 2, [2**64 - 1, -5], [True, False])
    assert options.seed.tolist() == [-1, -5]
    assert options.any_rejection
    assert not options.any_filter


def test_what_rows_need_is_known_without_asking_a_device() -> None:
    """Tensors on meta have no values to ask for."""
    plain = SamplingRows.build([0, 1], [0, 0], [1, 1], [0, 0], [0, 0], [False, True], device="meta")
    assert not plain.any_rejection and not plain.any_filter
    other = SamplingRows.build([0, 1], [0, 0], [1, 0.5], [0, 0], [0, 0], [False, False], device="meta")
    assert other.any_rejection and other.any_filter
