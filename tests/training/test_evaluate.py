"""Evaluation and calibration on a tiny drafter: the report's contract, right errors, refused files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import LoadError
from engine.loading import load_engine
from engine.schedule.calibrate import FILE, Calibration, Entry, load_calibration, make_method, sigmoid
from engine.training.__main__ import main
from engine.training.calibrate import calibrate
from engine.training.calibration import FITS, Rows, band, entry, fit, rising, write
from engine.training.decoding import decode, merge, open_engine, read_prompts, resolve_drafter
from engine.training.evaluate import Wish, evaluate
from engine.training.reliability import auc, block_sweep, ece, reliability, threshold_sweep
from engine.training.settings import SettingsError
from engine.types import EndConditions, Request, Sampling, Speculation, SpeculationMode, Verification


def simulated(rounds: int, seed: int, block: int = 7) -> Rows:
    """Rounds of a head that is too sure of itself in a known way: true logit = 0.6·logit − 0.3."""
    rng = np.random.default_rng(seed)
    confidence = 1 / (1 + np.exp(-rng.normal(1.0, 1.2, (rounds, block))))
    true = 1 / (1 + np.exp(-(0.6 * np.log(confidence / (1 - confidence)) - 0.3)))
    kept = (rng.random((rounds, block)) < true).cumprod(1).sum(1)
    return Rows(confidence, kept, np.full(rounds, block))


def test_the_report_keeps_its_contract(words: Path, questions: Path, tiny_drafter: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    name = str(tiny_drafter)
    wish = Wish(str(words), (name,), questions, tokens=12, running=4)
    evaluate(wish, out, None)
    report = json.loads(out.read_text())
    assert list(report) == [name] and set(report[name]) == {"code", "prose", "macro"}
    lengths = []
    for domain in ("code", "prose"):
        found = report[name][domain]
        assert found["prompts"] == 6 and found["rounds"] > 0
        shares = found["acceptance_by_position"]
        assert len(shares) == 4 and all(share is None or 0 <= share <= 1 for share in shares)
        assert 1.0 <= found["accepted_length"] <= 5.0
        lengths.append(found["accepted_length"])
    assert report[name]["macro"]["accepted_length"] == pytest.approx(sum(lengths) / 2, abs=1e-3)
    page = out.with_suffix(".md").read_text()
    assert "| drafter | code | prose | macro | rounds |" in page and "Calibration error" in page


def test_accepted_length_counts_committed_tokens(words: Path, questions: Path, tiny_drafter: Path) -> None:
    """The counts of every round add up, and the same seed decodes the same rounds."""
    engine, tokenizer = open_engine(str(words), str(tiny_drafter), 1, 4)
    prompts = [(p.domain, tokenizer.encode(p.text).ids) for p in read_prompts(questions)]
    runs = [merge(decode(engine, prompts, tokens=16, temperature=1.0, seed=8)) for _ in range(2)]
    assert runs[0] == runs[1]
    rounds = runs[0]
    confidence, kept, known = rounds.arrays()
    assert confidence.shape == (rounds.rounds, 4) and (kept <= known).all()
    ended = (known == kept) & (known < 4)  # the end token was itself drafted: no bonus token after it
    exact = kept.sum() + rounds.rounds - ended.sum()
    assert exact - rounds.rounds * 0.05 <= rounds.tokens <= exact
    assert not engine.has_work and engine.pool.available == engine.pool.total


def test_calibration_error_and_ranking_by_hand() -> None:
    predicted = np.array([0.11, 0.12, 0.13, 0.91, 0.92])
    happened = np.array([False, False, True, True, True])
    assert ece(predicted, happened) == pytest.approx((3 * abs(0.12 - 1 / 3) + 2 * abs(0.915 - 1)) / 5)
    assert auc(predicted, happened) == pytest.approx(1.0)
    ties = auc(np.array([0.5, 0.5, 0.2, 0.9]), np.array([True, False, False, True]))
    assert ties == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert auc(np.array([0.5]), np.array([True])) is None


def test_sweeps_by_hand() -> None:
    confidence = np.array([[0.9, 0.2, 0.9], [0.9, 0.9, 0.9]])
    kept = np.array([3, 1])
    assert threshold_sweep(confidence, kept, [0.5]) == [
        {"threshold": 0.5, "accepted_length": 2.0, "verified": 2.0, "kept_share": 0.5}
    ]
    assert [s["accepted_length"] for s in block_sweep(kept, 3)] == [2.0, 2.5, 3.0]


@pytest.mark.parametrize("name", FITS)
def test_every_method_mends_a_known_distortion(name: str) -> None:
    fitting, test = simulated(30_000, 1), simulated(30_000, 2)
    method = make_method(FITS[name](fitting), 7)
    before = reliability(test.confidence, test.kept, test.known)
    after = reliability(method.apply(test.confidence), test.kept, test.known)
    assert before["ece_mean"] > 0.1
    assert after["ece_mean"] < (0.05 if name == "sts" else 0.012)  # one temperature cannot move an offset
    assert after["auc_mean"] > before["auc_mean"] - 0.01


def test_the_choice_is_made_on_rounds_that_no_fit_saw() -> None:
    found = fit(simulated(20_000, 3), simulated(20_000, 4))
    assert found["method"] in ("platt", "survival_map")
    measured = found["measured"]
    assert set(measured) == {"none", *FITS}
    assert measured[found["method"]]["ece_mean"] == min(m["ece_mean"] for m in measured.values())
    with pytest.raises(SettingsError, match="too few to calibrate"):
        fit(simulated(50, 1), simulated(50, 2))


def test_affine_is_the_logistic_formula() -> None:
    method = make_method({"method": "sts", "parameters": {"temperatures": [2.0, 0.5]}}, 2)
    found = method.apply(np.array([[0.9, 0.3]]))[0]
    for value, raw, temperature in zip(found, (0.9, 0.3), (2.0, 0.5), strict=True):
        assert value == pytest.approx(1 / (1 + math.exp(-math.log(raw / (1 - raw)) / temperature)), abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_extreme_calibrations_are_right_to_the_last_digit_and_warn_of_nothing() -> None:
    def exact(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    wide = [-1e4, -800.0, -709.5, -40.0, -1e-9, 0.0, 3.0, 40.0, 800.0, 1e4]
    assert sigmoid(np.array(wide)).tolist() == pytest.approx([exact(x) for x in wide], rel=1e-12)
    slopes, offsets = [0.05, 1.0, 200.0, 200.0], [800.0, -800.0, 900.0, -900.0]
    method = make_method({"method": "platt", "parameters": {"slope": slopes, "offset": offsets}}, 4)
    for raw in (0.0, 1e-9, 0.3, 1.0):
        inner = min(max(raw, 1e-6), 1 - 1e-6)
        wanted = [exact(a * math.log(inner / (1 - inner)) + b) for a, b in zip(slopes, offsets, strict=True)]
        assert method.apply(np.full((1, 4), raw))[0].tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FITS)
def test_a_head_that_is_certain_and_right_can_be_fitted(name: str) -> None:
    certain = np.where(np.arange(600)[:, None] % 2 == 0, 1.0, 0.0) * np.ones((1, 3))
    rows = Rows(certain, np.where(certain[:, 0] > 0, 3, 0), np.full(600, 3))
    found = make_method(FITS[name](rows), 3).apply(np.array([[1.0] * 3, [0.0] * 3])).cumprod(1)
    assert (found[0] > 0.9).all() and (found[1] < 0.1).all()


@pytest.mark.parametrize("name", FITS)
def test_no_position_looks_ahead(name: str) -> None:
    """Non-anticipating: later confidences change nothing before them."""
    rows = simulated(2000, 5)
    method = make_method(FITS[name](rows), 7)
    changed = rows.confidence.copy()
    changed[:, 4:] = 0.5
    assert np.array_equal(method.apply(changed)[:, :4], method.apply(rows.confidence)[:, :4])


def test_rising_is_the_isotonic_regression() -> None:
    found = rising(np.array([1.0, 3.0, 2.0, 2.0, 5.0]), np.array([1.0, 1.0, 1.0, 2.0, 1.0]))
    assert found.tolist() == pytest.approx([1.0, 2.25, 2.25, 2.25, 5.0])


def test_modes_and_temperatures_have_their_own_entries() -> None:
    def made(verification: Verification, low: float, high: float) -> Entry:
        slope = make_method({"method": "platt", "parameters": {"slope": [low + 1.0]}}, 1)
        return Entry(verification, (low, high), "platt", slope)

    hot, warm, greedy = (made(Verification.REJECTION, *b) for b in ((0.9, 1.2), (0.4, 0.6), (0.0, 0.0)))
    calibration = Calibration((hot, warm, greedy))
    assert calibration.method(Verification.REJECTION, 1.0) is hot.method
    assert calibration.method(Verification.REJECTION, 0.7) is warm.method
    assert calibration.method(Verification.COUPLED, 1.0) is None
    assert calibration.method(Verification.COUPLED, 0.0) is greedy.method


def test_a_calibrated_drafter_serves_calibrated_confidences(
    words: Path, questions: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    """The engine applies the file beside the weights: raw σ-slope 3 turns into another verified length."""
    folder = tmp_path / "drafter"
    folder.mkdir()
    for file in tiny_drafter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    form = {"method": "platt", "parameters": {"slope": [1.0] * 4, "offset": [30.0] * 4}}
    write(folder, 4, [entry(form, Verification.REJECTION, 1.0)])

    def verified(draft: Path) -> int:
        config = EngineConfig(str(words), str(draft), kv_memory=2**22, max_model_len=128, confidence_threshold=0.99)
        engine = load_engine(config)
        speculation = Speculation(SpeculationMode.THRESHOLD, verification=Verification.REJECTION)
        engine.submit(Request("r", (5, 6, 7), EndConditions(20), Sampling(1.0, seed=1), speculation))
        return sum(delta.verified for _ in range(40) if engine.has_work for delta in engine.step())

    assert verified(tiny_drafter) == 0 < verified(folder)


def test_a_calibration_of_other_weights_is_refused(tiny_drafter: Path, words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    folder.mkdir()
    for file in tiny_drafter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    form = {"method": "sts", "parameters": {"temperatures": [1.5] * 4}}
    write(folder, 4, [entry(form, Verification.REJECTION, 1.0)])
    assert load_calibration(folder, 4) is not None
    good = (folder / FILE).read_text()
    for damage, message in (
        (good.replace('"weights_sha256": "', '"weights_sha256": "0'), "belongs to other weights"),
        (good[:40], "cannot be read as JSON"),
        (good.replace("1.5", "-1.5"), "slopes must be positive"),
        (good.replace('"sts"', '"magic"'), "method 'magic' is unknown"),
        (good.replace('"block_size": 4', '"block_size": 5'), "block_size 5"),
    ):
        (folder / FILE).write_text(damage)
        with pytest.raises(LoadError, match=rf"{folder / FILE}.*{message}"):
            load_engine(EngineConfig(str(words), str(folder), kv_memory=2**22, max_model_len=128))


def test_calibrate_writes_beside_the_drafter(words: Path, questions: Path, tiny_drafter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    folder.mkdir()
    for file in tiny_drafter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    wish = Wish(str(words), (str(folder),), questions, tokens=30, running=6, samples=4)
    path = calibrate(wish, (1.0, 0.0))
    table = json.loads(path.read_text())
    assert path == folder / FILE and [e["temperature"] for e in table["entries"]] == [band(1.0), band(0.0)]
    assert load_calibration(folder, 4) is not None
    calibrate(replace(wish, seed=5), (1.0,))
    assert len(json.loads(path.read_text())["entries"]) == 2, "a new fit replaces that of its own band only"
    report = evaluate(replace(wish, tokens=10), None, None)
    assert set(report[str(folder)]["macro"]["confidence"]) == {"raw", "calibrated"}


def test_bad_input_is_explained(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"domain": "x"}\n{"prompt": "w3"}\n')
    assert [p.line for p in read_prompts(prompts)] == [2]
    assert "line 1: skipped: no 'prompt'" in capsys.readouterr().err
    with pytest.raises(SettingsError, match=r"no drafter 'medusa'; embedded are .*dspark"):
        resolve_drafter("medusa")
    assert main(["evaluate", "--drafters", "medusa"]) == 2
    assert "error: no drafter 'medusa'" in capsys.readouterr().err
    assert main(["train", "--target", str(words), "--out", str(tmp_path), "--set", "run.stops=3"]) == 2
    assert "run.stops is unknown; did you mean run.steps?" in capsys.readouterr().err
