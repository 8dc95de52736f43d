"""Penalties against transformers, and the definitions of presence and frequency; log-probabilities."""

from __future__ import annotations

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from kernels.logprobs import token_logprobs
from kernels.penalties import penalize_

IDS = torch.tensor([3, 5, 8])


def test_repetition_is_that_of_transformers() -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 5, 3, 8]]), logits[None].clone())[0]
    assert torch.equal(penalize_(logits.clone(), seen_ids=IDS, repetition=1.3), expected)


def test_presence_counts_once_and_frequency_every_time() -> None:
    counts = torch.tensor([1, 4, 2])
    out = penalize_(torch.zeros(10), output_ids=IDS, output_counts=counts, presence=0.5, frequency=0.25)
    expected = torch.zeros(10)
    expected[IDS] = -torch.tensor([0.75, 1.5, 1.0])
    assert torch.equal(out, expected)


def test_bias_is_added_after_penalties_and_bans_come_last() -> None:
    out = penalize_(
        torch.full((10,), 2.0),
        seen_ids=IDS,
        repetition=2.0,
        bias_ids=torch.tensor([3, 4, 5]),
        bias_values=torch.tensor([10.0, -1.0, 100.0]),
        banned_ids=torch.tensor([5]),
    )
    assert out.tolist() == [2, 2, 2, 11, 1, -float("inf"), 2, 2, 1, 2]


def test_works_in_place_and_neutral_values_change_nothing() -> None:
    logits = torch.randn(10)
    before = logits.clone()
    empty = torch.zeros(0, dtype=torch.int64)
    assert penalize_(logits, seen_ids=IDS, output_ids=IDS, output_counts=IDS, banned_ids=empty) is logits
    assert torch.equal(logits, before)


def test_logprobs_are_the_log_softmax() -> None:
    logits = torch.randn(5, 40)
    chosen_ids = torch.tensor([0, 39, 7, 8, 9])
    expected = logits.log_softmax(-1)
    chosen, ids, values = token_logprobs(logits, chosen_ids, 3)
    torch.testing.assert_close(chosen, expected[torch.arange(5), chosen_ids])
    torch.testing.assert_close(values, expected.gather(1, ids))
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert token_logprobs(logits, chosen_ids, 0)[1].shape == (5, 0)
    assert token_logprobs(logits, chosen_ids, 99)[1].shape == (5, 40)
