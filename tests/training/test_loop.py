"""A run: resumed after a kill, spread over workers, refused when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.loading import load_engine
from engine.training.__main__ import main
from engine.training.loop import Trainer, export, train
from engine.training.plan import Plan, load_plan
from engine.training.settings import SettingsError, plain
from engine.training.states import StateError, States
from engine.training.workers import Worker
from engine.types import EndConditions, Request, Sampling, Speculation, SpeculationMode
from tests.training.conftest import weights

ALONE = Worker(0, 1, torch.device("cpu"))


def test_a_resumed_run_ends_with_the_same_bits(make_plan: Callable[..., Plan]) -> None:
    whole = make_plan("run.steps=7", "run.save_steps=3", out="whole")
    train(whole)
    halves = make_plan("run.steps=7", "run.save_steps=3", out="halves")
    trainer = Trainer(halves, ALONE)
    for step in range(5):  # killed after step 5: the checkpoint of step 3 is what is left
        if step == 3:
            trainer.save()
        trainer.advance()
    del trainer
    train(halves)
    expected, found = weights(whole.out), weights(halves.out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    served = [(plan.out / "drafter" / "model.safetensors").read_bytes() for plan in (whole, halves)]
    assert served[0] == served[1]


def test_a_killed_process_loses_one_interval_at_most(make_plan: Callable[..., Plan]) -> None:
    """SIGKILL in the middle, wherever it happens to be: the same command ends with the same weights."""
    plan = make_plan("run.steps=30", "run.save_steps=2", out="killed")
    lines = [f"{key}={value}" for key, value in flat(plain(plan))]
    command = [sys.executable, "-m", "engine.training", "train"]
    for line in lines:
        command += ["--set", line]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(States(plan.out / "states").all()) < 2:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    left = States(plan.out / "states").all()
    assert left and int(left[-1].name.removeprefix("step-")) < 30
    train(plan)
    reference = make_plan("run.steps=30", "run.save_steps=2", out="unbroken")
    train(reference)
    expected, found = weights(reference.out), weights(plan.out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (plan.out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))


def flat(tables: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Assignments for --set."""
    found = []
    for key, value in tables.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((prefix + key, json.dumps(value)))
    return found


def test_two_workers_take_the_step_of_one(make_plan: Callable[..., Plan]) -> None:
    changes = ("run.steps=3", "optim.kind=adamw", "optim.adam_lr=1e-3")  # Muon orthogonalises in bf16
    alone, pair = make_plan(*changes, out="alone"), make_plan(*changes, "run.workers=2", out="pair")
    train(alone)
    train(pair)
    expected, found = weights(alone.out), weights(pair.out)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=5e-5), (expected[name] - found[name]).abs().max()
    logs = [[json.loads(line) for line in (plan.out / "log.jsonl").read_text().splitlines()] for plan in (alone, pair)]
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-4) and one["tau"] == pytest.approx(two["tau"], abs=2e-4)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_trained_drafter_is_served(make_plan: Callable[..., Plan], head: str) -> None:
    plan = make_plan("run.steps=2", f"model.head={head}")
    folder = train(plan)
    engine = load_engine(EngineConfig(str(plan.target), str(folder), kv_memory=2**22, max_model_len=128))
    assert engine.info.drafter == "dspark" and engine.info.head == head and engine.info.has_confidence
    request = Request("r", (5, 6, 7), EndConditions(12), Sampling(0.0), Speculation(SpeculationMode.FIXED))
    engine.submit(request)
    deltas = [delta for _ in range(40) if engine.has_work for delta in engine.step()]
    assert sum(len(delta.tokens) for delta in deltas) == 12 and any(delta.verified for delta in deltas)


def test_dflash_is_served(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("run.steps=2", drafter="dflash")
    engine = load_engine(EngineConfig(str(plan.target), str(train(plan)), kv_memory=2**22, max_model_len=128))
    assert engine.info.drafter == "dflash" and not engine.info.has_confidence


def test_training_learns(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("run.steps=60", "optim.warmup=5", "optim.adam_lr=0.01")
    train(plan)
    rows = [json.loads(line) for line in (plan.out / "log.jsonl").read_text().splitlines()]
    first, last = (sum(row["loss"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.9 * first


def test_a_cached_run_computes_features_once(
    make_plan: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch reads the disk; a resumed run sees the same rounded features as an unbroken one."""
    plan = make_plan("run.steps=10", "data.long_from=1.0", f"data.cache={tmp_path / 'cache'}")
    trainer = Trainer(plan, ALONE)
    said = capsys.readouterr().err
    assert "GB at most" in said and str(tmp_path / "cache") in said
    calls = []
    run = trainer.frozen.run
    monkeypatch.setattr(trainer.frozen, "run", lambda tokens: (calls.append(1), run(tokens))[1])
    losses = [float(trainer.advance()[0]["loss"][0]) for _ in range(10)]
    assert 4 <= len(calls) < 10  # 19 windows, 4 a step
    again = Trainer(make_plan("run.steps=10", "data.long_from=1.0", f"data.cache={tmp_path / 'cache'}", out="2"), ALONE)
    assert [float(again.advance()[0]["loss"][0]) for _ in range(10)] == losses


def test_a_cache_needs_room_only_for_what_the_run_meets(
    make_plan: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of four rows meet 8 of the 19 windows, however long the corpus is."""
    Trainer(make_plan("run.steps=2", f"data.cache={tmp_path / 'short'}"), ALONE)
    assert ": 8 windows" in capsys.readouterr().err
    Trainer(make_plan("run.minutes=1", "run.steps=0", f"data.cache={tmp_path / 'open'}"), ALONE)
    assert ": 19 windows" in capsys.readouterr().err


def test_a_cache_of_another_target_is_refused(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    Trainer(make_plan(cache), ALONE)
    with pytest.raises(SettingsError, match=r"index\.json has another layers; delete"):
        Trainer(make_plan(cache, "model.feature_layers=[0, 1]", out="2"), ALONE)
    (tmp_path / "cache" / "rows.bin").write_bytes(b"short")
    with pytest.raises(SettingsError, match=r"rows\.bin has the wrong size; delete"):
        Trainer(make_plan(cache, out="3"), ALONE)


def test_a_damaged_checkpoint_is_refused(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("run.steps=4", "run.save_steps=2")
    train(plan)
    newest = States(plan.out / "states").all()[-1]
    path = newest / "state.pt"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        path.write_bytes(broken)
        with pytest.raises(StateError, match=rf"state\.pt cannot be resumed .*; delete {newest} to go on from step-"):
            train(plan)


def test_another_configuration_does_not_continue_a_run(make_plan: Callable[..., Plan]) -> None:
    train(make_plan("run.steps=2"))
    train(make_plan("run.steps=3"))  # a longer budget may
    for change, name in (("optim.muon_lr=0.5", "optim"), ("model.head=rnn", "model"), ("run.seed=9", "run.seed")):
        with pytest.raises(StateError, match=f"belongs to a run whose {name} was"):
            train(make_plan("run.steps=4", change))


def test_a_checkpoint_exports_without_a_run(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan("run.steps=2", drafter="dflash")
    folder = train(plan)
    out = export(plan.out, tmp_path / "copy")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(StateError, match="holds no checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "copy")


def test_the_export_command_writes_what_training_wrote(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan("run.steps=1")
    folder = train(plan)
    assert main(["export", "--run", str(plan.out), "--out", str(tmp_path / "own")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "own" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.mun_lr=1", r"optim\.mun_lr is unknown; did you mean optim\.muon_lr"),
        ("model.ttt=1", r"model\.ttt is unknown; "),
        ("data.length=ten", r"data\.length must be a whole number, got 'ten'"),
        ("run.steps=0", r"run\.steps or run\.minutes must be given"),
        ("model.head=transformer", "head 'transformer' is not one of none, vanilla, gated, rnn"),
        ("drafter=medusa", "no drafter 'medusa'; there are"),
        ("run.precision=fp8", r"run\.precision must be one of bf16, fp32"),
        ("model.loss=3", r"model\.loss must be a table, got 3"),
        ("steps", "write KEY=VALUE"),
    ],
)
def test_bad_settings_are_refused_by_name(make_plan: Callable[..., Plan], change: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plan(change)


def test_files_are_named_when_they_cannot_be_used(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    with pytest.raises(SettingsError, match=r"run\.toml is missing"):
        load_plan(config, [])
    config.write_text("[data\n")
    with pytest.raises(SettingsError, match=r"run\.toml is not readable TOML: .*line 1"):
        load_plan(config, [])
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(SettingsError, match=r"broken\.npz cannot be read"):
        train(make_plan(f"data.sources=['{tmp_path / 'broken.npz'}']"))


def test_the_file_and_overrides_make_one_plan(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'target = "t"\nout = "o"\ndrafter = "dflash"\n[data]\nsources = ["a.npy"]\n'
        "[run]\nsteps = 5\n[model]\nlayers = 3\n"
    )
    plan = load_plan(config, ["run.steps=9", "model.loss.distance=0.9"])
    assert (plan.run.steps, plan.model.layers, plan.model.loss.distance, plan.model.loss.cross_entropy) == (
        9,
        3,
        0.9,
        1.0,
    )
    assert plan.model.head == "none" and plan.data.sources == (Path("a.npy"),)
