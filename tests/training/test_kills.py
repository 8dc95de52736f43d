"""What a kill leaves at any moment can be gone on from; what is damaged is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import LoadError
from engine.training.__main__ import main
from engine.training.loop import Trainer, train
from engine.training.plan import Plan, load_plan
from engine.training.settings import SettingsError, plain
from engine.training.states import States
from engine.training.workers import Worker
from tests.training.conftest import weights

ALONE = Worker(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing after it runs."""


def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States 1 and 2 are there; the kill comes before the n-th operation of writing state 3, half a file written."""
    left = 0

    def counted(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if inner is torch.save:
                    args[1].write(b"half")
                raise Killed
            return inner(*args, **options)

        return call

    operations = ((torch, "save"), (os, "fsync"), (os, "rename"), (Path, "rename"), (Path, "write_text"))
    for owner, name in (*operations, (Path, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    moment, survived = 0, []
    while True:
        moment += 1
        left = 10**9
        states = States(tmp_path / str(moment))
        for step in (1, 2):
            states.save(step, {"step": step, "value": torch.full((4,), float(step))})
        left = moment
        try:
            states.save(3, {"step": 3, "value": torch.full((4,), 3.0)})
        except Killed:
            left = 10**9
            found = states.load()
            assert found is not None and found["step"] in (2, 3)
            assert torch.equal(found["value"], torch.full((4,), float(found["step"])))
            survived.append(found["step"])
            states.save(4, {"step": 4, "value": torch.zeros(4)})
            after = states.load()
            assert after is not None and after["step"] == 4 and len(states.all()) <= 2
            continue
        break
    assert survived == sorted(survived) and set(survived) == {2, 3} and len(survived) >= 6


def test_a_state_from_before_a_key_was_known_goes_on(make_plan: Callable[..., Plan]) -> None:
    train(make_plan("run.steps=2"))
    plan = make_plan("run.steps=3")
    newest = States(plan.out / "states").all()[-1]
    state = torch.load(newest / "state.pt", weights_only=True)
    tables = json.loads(state["plan"])
    del tables["model"]["draft_vocab"], tables["run"]["keep"]
    States(plan.out / "states").save(2, {**state, "plan": json.dumps(tables)})
    assert Trainer(plan, ALONE).step == 2


def test_drafters_are_kept_at_shares_of_the_budget(make_plan: Callable[..., Plan]) -> None:
    """For curves by training budget; the run is the same as one that keeps none."""
    plan = make_plan("run.steps=8", "run.keep=[0.25, 0.5]")
    train(plan)
    kept = sorted((plan.out / "kept").iterdir())
    assert [folder.name for folder in kept] == ["025.0", "050.0"]
    files = [(folder / "model.safetensors").read_bytes() for folder in (*kept, plan.out / "drafter")]
    assert len(set(files)) == 3
    other = make_plan("run.steps=8", out="none")
    train(other)
    expected, found = weights(other.out), weights(plan.out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(SettingsError, match=r"run\.keep \[1\.5\] must hold shares"):
        make_plan("run.keep=[1.5]")


def test_a_configuration_takes_what_it_does_not_say_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "common.toml").write_text('target = "t"\nout = "o"\n[data]\nsources = ["a.npy"]\n[run]\nsteps = 5\n')
    (tmp_path / "one.toml").write_text('base = "common.toml"\ndrafter = "dflash"\n[run]\nthreads = 2\n')
    plan = load_plan(tmp_path / "one.toml", [])
    assert (plan.drafter, plan.run.steps, plan.run.threads, plan.data.sources) == ("dflash", 5, 2, (Path("a.npy"),))
    (tmp_path / "common.toml").write_text('base = "one.toml"\n')
    with pytest.raises(SettingsError, match=r"one\.toml: base leads back to it"):
        load_plan(tmp_path / "one.toml", [])
    (tmp_path / "common.toml").unlink()
    with pytest.raises(SettingsError, match=r"common\.toml is missing"):
        load_plan(tmp_path / "one.toml", [])


def spoilt(target: Path, folder: Path, name: str, content: bytes | None) -> Path:
    shutil.copytree(target, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-50] if content is None else content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, r"model\.safetensors is not a readable safetensors file"),
        ("config.json", b'{"vocab_size": ', r"config\.json cannot be read as JSON"),
        ("config.json", b"{}", r"config\.json: vocab_size is missing"),
    ],
)
def test_a_damaged_target_is_refused(
    make_plan: Callable[..., Plan], tiny_target: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = spoilt(tiny_target, tmp_path / "target", name, content)
    with pytest.raises(LoadError, match=message):
        Trainer(make_plan(f"target={folder}"), ALONE)


def test_damaged_held_out_text_is_refused_before_a_step(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    path = tmp_path / "heldout.npz"
    for make, message in (
        (lambda: path.write_bytes(b"PK\x03\x04 half"), r"data\.heldout: .*heldout\.npz cannot be read"),
        (lambda: np.savez(path, code=np.arange(9)), r"data\.heldout: code in .* must hold more than 65 tokens"),
        (lambda: np.savez(path, code=np.full(500, 96)), "all below 96"),
    ):
        make()
        with pytest.raises(SettingsError, match=message):
            Trainer(make_plan(f"data.heldout={path}"), ALONE)
    np.savez(path, code=np.arange(500) % 96, prose=np.arange(700) % 96)
    assert set(Trainer(make_plan(f"data.heldout={path}"), ALONE).heldout()) == {"code", "prose"}


def test_a_damaged_feature_cache_is_refused(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    """Truncated index, and a bit that turned in features that were written."""
    plan = make_plan("run.steps=10", "data.long_from=1.0", f"data.cache={tmp_path / 'cache'}")
    trainer = Trainer(plan, ALONE)
    for _ in range(5):
        trainer.advance()
    trainer.cache._data[:, 3, 2] ^= 1  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match=r"rows\.bin is damaged at window \d+; delete .*cache"):
        list(iter(trainer.advance, None))  # a window of the second epoch is read before long
    index = tmp_path / "cache" / "index.json"
    index.write_text(index.read_text()[:20])
    with pytest.raises(SettingsError, match=r"index\.json cannot be read .*; delete .*cache"):
        Trainer(make_plan(f"data.cache={tmp_path / 'cache'}", out="2"), ALONE)


def test_damaged_files_end_a_command_with_one_line(
    make_plan: Callable[..., Plan], tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoilt(tiny_target, tmp_path / "target", "model.safetensors", None)
    plan = make_plan()
    assignments = [f"target={folder}", f"out={plan.out}", f"data.sources=['{plan.data.sources[0]}']", "run.steps=1"]
    words = [word for assignment in assignments for word in ("--set", assignment)]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "fetch it again" in said


def test_without_tensorboard_the_run_says_how_to_get_it(
    make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    plan = make_plan("run.steps=1")
    train(plan)
    assert "no TensorBoard logs" in capsys.readouterr().err and not (plan.out / "tensorboard").exists()


def test_two_processes_of_torchrun_take_the_steps_of_one(make_plan: Callable[..., Plan]) -> None:
    changes = ("run.steps=3", "optim.kind=adamw", "optim.adam_lr=1e-4")  # Muon orthogonalises in bf16
    alone, pair = make_plan(*changes, out="alone"), make_plan(*changes, out="pair")
    train(alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["engine.training", "train"]
    for key, value in flat(plain(pair)):
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    logs = [[json.loads(line) for line in (plan.out / "log.jsonl").read_text().splitlines()] for plan in (alone, pair)]
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    expected, found = weights(alone.out), weights(pair.out)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5), (expected[name] - found[name]).abs().max()


def flat(tables: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Assignments for --set."""
    found = []
    for key, value in tables.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((prefix + key, json.dumps(value)))
    return found
