"""The comparison command: everything done once, what is missing done again, figures that are evaluate's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.schedule.calibrate import FILE, load_calibration
from engine.training import compare as compare_module
from engine.training.__main__ import main
from engine.training.comparison import load_comparison
from engine.training.settings import SettingsError

COMMON = """
[data]
sources = ["{tokens}"]
length = 64
long = 64
batch_tokens = 256
[optim]
warmup = 2
[run]
steps = 4
precision = "fp32"
device = "cpu"
keep = [0.5]
[model]
anchors = 16
"""
CONFIG = """
target = "{target}"
runs = "{folder}/runs"
out = "{folder}/report"
prompts = "{prompts}"
calibration = "{prompts}"
temperatures = [1.0, 0.6]
tokens = 16
calibration_samples = 8
[[arms]]
name = "dspark"
title = "DSpark"
recipe = "dspark.toml"
[[arms]]
name = "taken"
drafter = "{drafter}"
[[arms]]
name = "dspark-1"
group = "depth"
line = "DSpark"
recipe = "dspark.toml"
set = ["model.layers=1"]
"""


@pytest.fixture
def config(words: Path, questions: Path, token_file: Path, tiny_drafter: Path, tmp_path: Path) -> Path:
    (tmp_path / "common.toml").write_text(COMMON.format(tokens=token_file))
    own = "block_size = 4\nmarkov_rank = 8\n"
    (tmp_path / "dspark.toml").write_text(
        f'base = "common.toml"\ntarget = "t"\nout = "o"\ndrafter = "dspark"\n[model]\n{own}'
    )
    taken = tmp_path / "taken"
    taken.mkdir()
    for file in tiny_drafter.iterdir():
        (taken / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "report.toml"
    path.write_text(CONFIG.format(target=words, folder=tmp_path, prompts=questions, drafter=taken))
    return path


def test_a_comparison_from_training_to_the_page(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["compare", "--config", str(config)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.md")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["results"]) == {"1", "0.6"} and list(report["results"]["1"]) == ["DSpark", "taken"]
    for entry in report["results"]["1"].values():
        lengths = [entry[domain]["accepted_length"] for domain in ("code", "prose")]
        assert entry["macro"]["accepted_length"] == pytest.approx(sum(lengths) / 2, abs=1e-3)
        assert set(entry["macro"]["confidence"]) == {"raw", "calibrated"}
    assert {(p["line"], p["layers"]) for p in report["depth"]} >= {("DSpark", 2), ("DSpark", 1)}
    assert [point["share"] for point in report["curve"]["DSpark"]] == [0.5, 1.0] and not report["curve"]["taken"]
    assert report["differences"] == []
    assert load_calibration(tmp_path / "taken", 4) is not None
    page = (tmp_path / "report" / "report.md").read_text()
    for title in ("| DSpark over | code | prose | macro |", "## Accepted length by draft layers", "| 50 % | 100 % |"):
        assert title in page

    # A second time nothing is trained, calibrated or decoded; after a loss, only what is lost.
    done: list[str] = []
    inner = compare_module.measure
    monkeypatch.setattr(compare_module, "train", lambda plan: pytest.fail("trained again"))
    monkeypatch.setattr(compare_module, "calibrate", lambda *_: pytest.fail("calibrated again"))
    monkeypatch.setattr(compare_module, "measure", lambda wish, name: (done.append(name), inner(wish, name))[1])
    kept = (tmp_path / "report" / "report.json").read_bytes()
    assert main(["compare", "--config", str(config)]) == 0
    assert not done
    measured = tmp_path / "runs" / "measured" / "taken-T0.6.json"
    measured.write_text(measured.read_text()[:100])
    assert main(["compare", "--config", str(config)]) == 0
    assert done == [str(tmp_path / "taken")] and (tmp_path / "report" / "report.json").read_bytes() == kept
    (tmp_path / "taken" / FILE).unlink()
    with pytest.raises(pytest.fail.Exception, match="calibrated again"):
        main(["compare", "--config", str(config)])


def test_a_comparison_that_cannot_be_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no arm 'mtp'; there are dspark, taken, dspark-1"):
        load_comparison(config, [], ("mtp",))
    with pytest.raises(SettingsError, match=r"arms\.recipee is unknown; did you mean arms\.recipe\?"):
        load_comparison(config, ["arms=[{name='a', recipee='x'}]"])
    with pytest.raises(SettingsError, match="a: give either recipe or drafter"):
        load_comparison(config, ["arms=[{name='a'}]"])
    comparison = load_comparison(config, [], ("dspark",))
    (tmp_path / "dspark.toml").unlink()
    with pytest.raises(SettingsError, match=r"dspark\.toml is missing"):
        compare_module.compare(comparison, tmp_path)


def test_the_recipes_of_the_report_hold() -> None:
    """Every arm of the shipped comparison has a plan, and all of them the same data, optimiser and budget."""
    folder = Path("engine/demo/recipes")
    comparison = load_comparison(folder / "report.toml", [])
    plans = {arm.name: comparison.plan(arm, folder) for arm in comparison.arms}
    kinds = {name: plan.drafter for name, plan in plans.items() if "layer" not in name}
    assert set(kinds.values()) == {"dspark", "dflash", "eagle3", "mtp"} and len(kinds) == 7
    assert compare_module.differences(plans) == []
    assert plans["dflash"].model.loss.distance == 0 and plans["dflash-distance"].model.loss.distance == 0.9


def test_a_report_says_nothing_of_whose_home_the_target_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert compare_module._from_home("/home/somebody/.cache/target") == "~/.cache/target"
    assert compare_module._from_home("engine/demo/target") == "engine/demo/target"
