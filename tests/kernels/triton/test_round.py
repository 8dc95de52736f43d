"""`make bench-round`: a round accepts what it was told to, every stage runs, and without a GPU it says so."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.bench import round as bench
from tests.bench.kernels import on_cpu, on_gpu
from tests.bench.model import Depth, Model, Round
from tests.bench.registry import Sizes
from tests.kernels.triton.cases import DEVICE

ON_GPU = DEVICE.type == "cuda"


@pytest.fixture(scope="module")
def model() -> Model:
    sizes = Sizes(64, 96, 2, 1, 32, 300, 32, 3, torch.float32, DEVICE, (3,), (20,), 3, triton=ON_GPU)
    return Model(sizes, Depth(2, 1, (0, 1)))


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_a_round_accepts_what_it_was_told_to(model: Model, mode: str) -> None:
    work = Round(model, 20, [0, 3, 1], mode)
    accepted, _, failed = work.accept()
    assert accepted.tolist() == [0, 3, 1] and not failed.any()
    assert len(work.kept) == 1 + 4 + 2


def test_every_stage_is_measured_beside_its_floor(model: Model) -> None:
    work = Round(model, 20, [2, 1], "rejection")
    timer = on_gpu(1) if ON_GPU else on_cpu(1)
    found = bench.measure(work, timer, (1e9, 1e9), 1)
    assert set(found["stages_us"]) == set(found["floors_us"]) == {
        "draft", "head", "select", "verify", "accept", "absorb",
    }  # fmt: skip
    assert found["round_us"] > 0 and found["floor_us"] > 0 and found["plain_floor_us"] > 0


def test_profiles_have_the_chances_shares() -> None:
    assert bench.profile([1.0], 4, 3) == [4, 4, 4]
    assert bench.profile([0.0], 4, 3) == [0, 0, 0]
    assert sorted(bench.profile([0.5], 3, 8)) == [0, 0, 0, 0, 1, 1, 2, 3]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench-round"])
    assert bench.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and "no GPU" in err and "--cpu" in err
