"""The losslessness proof at a size for every run of the tests; `make lossless` is the same at full size."""

from __future__ import annotations

import pytest

from engine.types import SpeculationMode
from tests.lossless.appendix import TARGET, causal, probability_of_a, retrospective
from tests.lossless.arms import REAL, Arm, honest, mutants, sample

SAMPLES = 4_000
QUICK = [arm for arm in honest() if arm.running > 1]
SCHEDULED = [arm for arm in QUICK if arm.mode is SpeculationMode.AUTO]
FEW = [a for index, a in enumerate(QUICK) if index % 3 == 0 or a.sampling.edits_logits or a.drafter in REAL[1:]]
FEW = [a for a in FEW if a not in SCHEDULED] + [a for a in SCHEDULED if a.sampling.temperature == 1]
FEW = [a for a in FEW if not a.on_device or a.policy in ("relayed", "auto") or a.drafter != "random"]


@pytest.mark.parametrize("arm", FEW, ids=lambda arm: arm.name)
def test_the_joint_law_of_tokens_2_to_4_is_exact(arm: Arm) -> None:
    outcome = sample(arm, SAMPLES)
    assert outcome.passed, outcome
    if arm.drafter == "same" and not arm.sampling.edits_logits:
        assert outcome.accepted == outcome.verified, "a draft from the target itself must never be rejected"
    assert bool(outcome.copied) == arm.copies
    if arm.drafter == "near" or arm.drafter in REAL[1:] or (arm.on_device and arm.drafter != "none"):
        assert 0 < outcome.accepted < outcome.verified, "the arm must both accept and reject"


@pytest.mark.slow
@pytest.mark.parametrize("arm", [arm for arm in honest() if arm not in FEW], ids=lambda arm: arm.name)
def test_the_joint_law_of_the_other_arms(arm: Arm) -> None:
    outcome = sample(arm, SAMPLES)
    assert outcome.passed, outcome


def test_an_arm_alone_gives_the_samples_that_it_gives_among_others() -> None:
    """Same seeds, so not only the same law: the same counts."""
    alone, together = (sample(Arm("near", running=running), 300).fit for running in (1, 32))
    assert alone == together


@pytest.mark.parametrize("arm", mutants(), ids=lambda arm: arm.drafter)
def test_mutants_are_caught(arm: Arm) -> None:
    outcome = sample(arm, SAMPLES // 2 if arm.reference else SAMPLES)
    assert outcome.fit.p_value < 1e-6, outcome


def test_the_reference_that_the_last_mutant_breaks_is_itself_right() -> None:
    outcome = sample(Arm("split", reference=True), SAMPLES // 2)
    assert outcome.passed, outcome


def test_appendix_a() -> None:
    """The paper's figures: .85 with hindsight, .70 without."""
    assert float(probability_of_a(retrospective)) == pytest.approx(0.85)
    assert probability_of_a(causal) == TARGET["A"]
