"""Live reliability against streams whose true acceptance is known."""

from __future__ import annotations

import numpy as np
import pytest

from engine.schedule.reliability import BANDS, Reliability, band, logit
from engine.types import Sampling, Verification

GAMMA = 4


def teach(reliability: Reliability, which: int, handed: np.ndarray, accepted: int) -> None:
    """One whole block's fate."""
    one = [np.array([value]) for value in (which, GAMMA, accepted)]
    reliability.teach(one[0], handed[None], one[1], one[2])


def stream(reliability: Reliability, rounds: int, bias: float, which: int = 3, seed: int = 0) -> None:
    """Blocks whose handed confidences are `bias` logits too high past the first two positions."""
    generator = np.random.default_rng(seed)
    offset = np.array([0, 0, bias, bias])
    for _ in range(rounds):
        true = 1 / (1 + np.exp(-generator.normal(0.5, 1.0, GAMMA)))
        handed = logit(true) + offset
        fate = generator.random(GAMMA) < true
        accepted = int(np.argmin([*fate, False]))
        teach(reliability, which, handed, accepted)


def corrected(reliability: Reliability, confidence: list[float], which: int = 3) -> np.ndarray:
    """Conditional, from the cumulative survival."""
    survival, _ = reliability.correct(np.array([confidence]), np.array([which]))
    return survival[0] / np.array([1, *survival[0][:-1]])


def test_believed_until_contradicted() -> None:
    confidence = [0.9, 0.5, 0.2, 0.7]
    np.testing.assert_allclose(corrected(Reliability(GAMMA, True), confidence), confidence, rtol=1e-9)


@pytest.mark.parametrize("bias", [-1.5, 0.0, 1.5])
def test_bias_is_found_by_position(bias: float) -> None:
    reliability = Reliability(GAMMA, True)
    stream(reliability, 3000, bias)
    true = np.array([0.6, 0.6, 0.6, 0.6])
    handed = 1 / (1 + np.exp(-(logit(true) + np.array([0, 0, bias, bias]))))
    np.testing.assert_allclose(corrected(reliability, handed.tolist()), true, atol=0.06)


def test_drift_is_followed() -> None:
    reliability = Reliability(GAMMA, True)
    stream(reliability, 2000, 0.0)
    stream(reliability, 3000, 2.0, seed=1)
    handed = 1 / (1 + np.exp(-(logit(np.full(4, 0.6)) + np.array([0, 0, 2, 2]))))
    np.testing.assert_allclose(corrected(reliability, handed.tolist()), np.full(4, 0.6), atol=0.08)


def test_bands_are_apart() -> None:
    reliability = Reliability(GAMMA, True)
    stream(reliability, 1000, 2.0, which=3)
    confidence = [0.9, 0.5, 0.2, 0.7]
    np.testing.assert_allclose(corrected(reliability, confidence, which=5), confidence, rtol=1e-9)
    assert reliability.verified[5].sum() == 0 < reliability.verified[3].sum()


def test_what_lies_behind_a_rejection_teaches_nothing() -> None:
    reliability = Reliability(GAMMA, True)
    for _ in range(200):
        teach(reliability, 0, np.zeros(GAMMA), 1)
    assert reliability.verified[0, 0] == reliability.verified[0, 1] > 0
    assert reliability.verified[0, 2] == reliability.verified[0, 3] == 0


def test_survival_never_rises_even_for_nonsense() -> None:
    reliability = Reliability(GAMMA, True)
    confidence = np.array([[0.0, 1.0, np.nextafter(1, 0), 0.5]])
    survival, _ = reliability.correct(confidence, np.array([0]))
    assert np.isfinite(survival).all() and (np.diff(survival) <= 0).all()


def test_bands_by_temperature_and_mode() -> None:
    found = {
        band(Sampling(temperature=t), mode)
        for t in (0.3, 0.7, 1.0)
        for mode in (Verification.REJECTION, Verification.COUPLED)
    }
    greedy = {band(Sampling(temperature=0.0), mode) for mode in Verification}
    assert len(found) == 6 and greedy == {0} and not found & greedy and max(found) < BANDS
