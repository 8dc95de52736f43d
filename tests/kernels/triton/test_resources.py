"""Every kernel compiles for the GPUs that we name, without one at hand, and the hot ones spill nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.kernels.triton.resources import RESULTS, TARGETS

ROOT = RESULTS.parents[2]
# Once a request, not once a row or tile: these may keep a few numbers on the stack.
COLD = ("verify._decide", "verify._weigh", "markov_sample._choose", "filters._filter_rows")


def hot_spills(table: dict) -> list[str]:
    return [
        f"{name} {target}: {found}"
        for name, targets in table.items()
        for target, found in targets.items()
        if not name.startswith(COLD) and found["stack"] + found["local"] > 0
    ]


def test_the_committed_table_names_every_kernel_and_hot_ones_spill_nothing() -> None:
    table = json.loads(RESULTS.read_text())["kernels"]
    launched = {
        f"{path.stem}.{name}"
        for path in (ROOT / "kernels" / "triton").glob("*.py")
        for name in re.findall(r"^ +(_\w+)\[", path.read_text(), re.M)
    }
    assert {name.split()[0] for name in table} == launched
    assert all(set(targets) == {f"sm_{target}" for target in TARGETS} for targets in table.values())
    assert hot_spills(table) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_without_spills_where_it_is_hot() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.resources", "--print"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hot_spills(json.loads(done.stdout)["kernels"]) == []
