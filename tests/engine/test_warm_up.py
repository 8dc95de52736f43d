"""Nobody waits for code to be compiled once an engine is warm: a first start would take seconds of everybody's time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("drafter", ["dspark", "mtp"])
def test_a_warm_engine_compiles_nothing(drafter: str) -> None:
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run(
        [sys.executable, "-m", "tests.engine.late_code", drafter], cwd=root, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert not told.stdout.split(), "add what uses these to engine.loading.warm_up"
