"""The sequential head on a device: equal to its reference, and rows that stand alone."""

from __future__ import annotations

import pytest
import torch

from kernels.markov_sample import HeadWeights
from kernels.reference import markov_sample as reference
from kernels.triton import markov_sample as device
from tests.kernels import test_markov_sample as cases
from tests.kernels.triton.cases import DEVICE
from tests.kernels.triton.test_verify import moved

BLOCK = 2


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("SEGMENT", 64), ("WIDTH", 32), ("BLOCK", 64), ("SEARCH", 64)):
        monkeypatch.setattr(device, name, size)


def on_device(head: HeadWeights) -> HeadWeights:
    names = ("w1", "w2", "ids", "gate_weight", "gate_bias", "joint_weight", "joint_bias", "confidence_weight")
    parts = {name: None if getattr(head, name) is None else getattr(head, name).to(DEVICE) for name in names}
    return HeadWeights(
        kind=head.kind,
        vocabulary=head.vocabulary,
        **parts,
        confidence_bias=head.confidence_bias,
        confidence_with_markov=head.confidence_with_markov,
    )


def make_case(vocabulary: int, seed: int, rows: int = 6) -> dict:
    case = cases.take(cases.make_case(vocabulary, seed), torch.arange(rows))
    return case | {name: case[name][:, :BLOCK].contiguous() for name in ("base_logits", "hidden")}


def run(head: HeadWeights, case: dict) -> tuple:
    found = device.markov_sample(head=on_device(head), **{name: moved(value) for name, value in case.items()})
    return tuple(None if value is None else value.cpu() for value in found)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("none", torch.float32), ("vanilla", torch.float32), ("vanilla", torch.bfloat16), ("gated", torch.bfloat16),
     ("rnn", torch.float32)],
)  # fmt: skip
def test_equals_reference(kind: str, dtype: torch.dtype) -> None:
    head, case = cases.make_head(kind, 101, dtype), make_case(101, 1)
    tokens, logits, log_z, confidence = run(head, case)
    expected_tokens, expected_logits, expected_z, expected_confidence = reference.markov_sample(head=head, **case)
    assert torch.equal(tokens, expected_tokens)
    near = {"rtol": 1e-4, "atol": 2e-4}  # of a bfloat16 head: the latent is carried in two factors
    torch.testing.assert_close(log_z, expected_z, **near)
    torch.testing.assert_close(confidence, expected_confidence, rtol=0, atol=1e-6)
    drawn = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
    assert drawn.any()
    torch.testing.assert_close(logits[drawn], expected_logits[drawn], **near)


def test_a_row_depends_on_nothing_but_itself() -> None:
    head, case = cases.make_head("vanilla", 101), make_case(101, 4)
    together = run(head, case)
    drawn = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
    for i in (0, 3):
        alone = run(head, cases.take(case, torch.tensor([i])))
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[2][0], together[2][i])
        if drawn[i]:
            assert torch.equal(alone[1][0], together[1][i])


def test_greedy_rows_need_no_logits_and_broken_ones_draft_possible_ids() -> None:
    head, case = cases.make_head("vanilla", 101), make_case(101, 3)
    case["base_logits"][0, 0] = float("nan")
    case["base_logits"][1, 1] = -float("inf")
    tokens, logits, log_z, _ = run(head, case)
    assert ((tokens >= 0) & (tokens < 101)).all()
    drawn = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
    broken = torch.zeros(6, BLOCK, dtype=torch.bool)
    broken[0, 0] = broken[1, 1] = True
    assert torch.equal(log_z.isnan(), broken & drawn[:, None])
    case = make_case(101, 3)
    case["sampling"] = cases.SamplingRows.build([0.0] * 6, [0] * 6, [1.0] * 6, [0.0] * 6, [0] * 6, [False] * 6)
    tokens, logits, _, _ = run(head, case)
    assert logits is None
    assert torch.equal(tokens, reference.markov_sample(head=head, **case)[0])
