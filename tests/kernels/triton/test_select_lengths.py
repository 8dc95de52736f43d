"""Sharing a budget of verified tokens: what the host's scheduler chooses, on the device and in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.schedule.lengths import Candidate, top
from engine.types import Speculation
from kernels import select_lengths as wrapper
from kernels.triton import select_lengths as device
from tests.kernels.triton.cases import DEVICE, seeded

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def on_device(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(out.cpu() for out in device.select_lengths(*(value.to(DEVICE) for value in arguments)))


@pytest.fixture(params=[wrapper.select_lengths, on_device], ids=["plain", "triton"])
def select(request: pytest.FixtureRequest) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return request.param


def make_case(rows: int, block: int, levels: int | None = None, seed: int = 0) -> Case:
    """With `levels`, confidences and weights take few values: most candidates tie."""
    generator = seeded(seed)
    confidence = torch.rand(rows, block, generator=generator)
    weights = 0.5 + torch.rand(rows, generator=generator)
    if levels:
        confidence, weights = (confidence * levels).ceil() / levels, (weights * 2).round() / 2
    return confidence, weights, torch.randint(0, block + 1, (rows,), generator=generator)


def by_the_host(case: Case, survival: torch.Tensor, budget: int) -> list[int]:
    """What `engine.schedule` chooses by a heap of frontier candidates."""
    _, weights, limits = case
    gains = (weights[:, None] * survival).tolist()
    blocks = zip(gains, limits.tolist(), strict=True)
    return top([Candidate(None, limit, Speculation(), tuple(gain)) for gain, limit in blocks], budget).lengths


@pytest.mark.parametrize(("rows", "block", "levels"), [(1, 1, None), (5, 7, None), (70, 5, 2), (33, 8, 1)])
def test_it_is_the_schedulers_choice(select: Callable, rows: int, block: int, levels: int | None) -> None:
    case = make_case(rows, block, levels)
    most = int(case[2].sum())
    for budget in (0, most // 3, most + 5):
        lengths, survival = select(*case, torch.tensor(budget))
        torch.testing.assert_close(survival, case[0].double().cumprod(1).float(), rtol=1e-6, atol=0)
        assert lengths.tolist() == by_the_host(case, survival, budget)


def test_ties_go_to_earlier_positions_then_to_earlier_rows(select: Callable) -> None:
    ones = torch.ones(4, 3)
    lengths, _ = select(ones, torch.ones(4), torch.full((4,), 3), torch.tensor(6))
    assert lengths.tolist() == [2, 2, 1, 1]


def test_confidences_that_are_none_end_a_block(select: Callable) -> None:
    confidence = torch.tensor([[0.9, torch.nan, 0.9], [1.5, 0.5, -0.2]])
    lengths, survival = select(confidence, torch.ones(2), torch.tensor([3, 3]), torch.tensor(3))
    assert lengths.tolist() == [1, 2]
    torch.testing.assert_close(survival, torch.tensor([[0.9, 0, 0], [1, 0.5, 0]]))


def test_nothing_drafted_and_shapes_that_do_not_fit(select: Callable) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    lengths, survival = select(torch.zeros(0, 4), torch.zeros(0), none, torch.tensor(3))
    assert lengths.shape == (0,) and survival.shape == (0, 4)
    with pytest.raises(ValueError, match="weights"):
        wrapper.select_lengths(torch.zeros(2, 3), torch.ones(3), torch.ones(2), torch.tensor(1))


@pytest.mark.slow
def test_many_requests(select: Callable) -> None:
    case = make_case(1000, 15)
    lengths, survival = select(*case, torch.tensor(2500))
    assert lengths.tolist() == by_the_host(case, survival, 2500)
