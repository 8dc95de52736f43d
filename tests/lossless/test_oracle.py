"""The oracle and the statistics are themselves held to something simpler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.types import Sampling
from tests.lossless.arms import PENALTIES, PROMPTS, VOCAB, target
from tests.lossless.exact import conditionals, joint_of_tokens_2_to_4, levels, paths
from tests.lossless.statistics import fit


def test_the_joint_sums_to_one_and_agrees_with_its_parts() -> None:
    _, tree = target()
    for sampling in (Sampling(), Sampling(temperature=0.7, top_p=0.8), PENALTIES):
        conditional = conditionals(tree, sampling)
        joint = joint_of_tokens_2_to_4(conditional, VOCAB)
        np.testing.assert_allclose(joint.sum(-1), 1)
        first, second = (conditional[0, level] for level in levels(VOCAB)[:2])
        np.testing.assert_allclose(joint[0].reshape(VOCAB, -1).sum(-1), (first.T * second).sum(0))


def test_penalties_by_hand() -> None:
    """One node, worked out in place: repetition, then presence and frequency, then bias."""
    _, tree = target()
    output = (3, 3)
    node = (0 * VOCAB + 1 + output[0]) * VOCAB + 1 + output[1]
    logits = torch.tensor(tree.logits[1, node])
    for token in {*PROMPTS[1], *output}:
        logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
    logits[3] -= 0.4 + 2 * 0.3
    logits[2] += 0.8
    logits[5] -= 0.6
    expected = logits.double().softmax(-1)
    np.testing.assert_allclose(conditionals(tree, PENALTIES)[1, node], expected, rtol=1e-5)


def test_paths_are_in_heap_order() -> None:
    assert paths(3, 2).tolist() == [[a, b] for a in range(3) for b in range(3)]
    assert [level.start for level in levels(3)] == [0, 1, 4, 13]


@pytest.mark.parametrize("samples", [300, 20_000])
def test_exact_samples_fit_and_others_do_not(samples: int) -> None:
    generator = np.random.default_rng(3)
    law = generator.dirichlet(np.full(200, 0.3), size=2)
    drawn = np.stack([generator.multinomial(samples, p) for p in law])
    good = fit(drawn, law)
    assert good.p_value > 1e-3
    assert good.variation == pytest.approx(good.floor, rel=0.2)
    skewed = law**2 / (law**2).sum(-1, keepdims=True)
    assert fit(np.stack([generator.multinomial(samples, p) for p in skewed]), law).p_value < 1e-3


def test_something_impossible_fails_at_once() -> None:
    law = np.array([[0.5, 0.5, 0.0]])
    assert fit(np.array([[500, 499, 1]]), law).p_value == 0


def test_p_values_are_uniform_under_the_law() -> None:
    generator = np.random.default_rng(8)
    law = generator.dirichlet(np.full(60, 0.5), size=1)
    values = [fit(generator.multinomial(2000, law[0])[None], law, simulations=1).p_value for _ in range(400)]
    assert abs(np.mean(np.array(values) < 0.1) - 0.1) < 0.06
