"""`make bench-kernels`: every kernel has an entry, every entry runs, and without a GPU it says so."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from tests.bench import kernels
from tests.bench.registry import REGISTRY, Sizes
from tests.kernels.triton.cases import DEVICE
from tests.kernels.triton.test_resources import ROOT

OPS = {"filters": "filter_logits", "noise": "exponential_rows"}  # of modules that are not called like their op


def test_every_module_that_launches_a_kernel_has_an_entry() -> None:
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        if re.search(r"^ +_\w+\[", path.read_text(), re.M):
            assert OPS.get(path.stem, path.stem) in REGISTRY


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_entry_runs(name: str) -> None:
    sizes = Sizes(32, 48, 2, 1, 32, 300, 32, 2, torch.float32, DEVICE, (2,), (20,), 3, triton=True)
    timed = []
    for case in REGISTRY[name](sizes):
        if case.reset:
            case.reset()
        case.run()
        timed.append(case.shape)
        assert case.bytes > 0 and case.flops >= 0
    assert timed and len(set(timed)) == len(timed)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench-kernels"])
    assert kernels.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and "no GPU" in err and "--cpu" in err
