"""Kernels compiled for lesser processors than this one. Numba's target is one of the process: one each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from docker.levels import LEVELS, flags_here, supported

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = [level for level in LEVELS if "avx512_bf16" not in level.flags]
ROUNDING = """
import numpy as np, torch
from kernels.jit import entry
from kernels.simd import HAS_DOT, load, load_float, store_narrow, store_narrow_float
assert not HAS_DOT

@entry
def narrow(source, target, alone, count):
    for i in range(0, count, 16):
        store_narrow(target + 2 * i, load(source + 4 * i))
    for i in range(count):
        store_narrow_float(alone + 2 * i, load_float(source + 4 * i))

edge = np.array([0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FC00000, 0x7F800001, 0xFFFFFFFF,
                 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x477FFFFF, 0x00008000, 0x3F80FFFF], np.uint32)
bits = np.concatenate([edge, np.random.default_rng(0).integers(0, 2**32, 16 * 4096, dtype=np.uint32)])
values = bits.view(np.float32)
many, one = np.zeros(len(bits), np.uint16), np.zeros(len(bits), np.uint16)
narrow(values.ctypes.data, many.ctypes.data, one.ctypes.data, len(bits))
expected = torch.from_numpy(values).bfloat16()
for found in (many, one):
    found = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    where = ~expected.isnan()
    assert torch.equal(found[where].view(torch.int16), expected[where].view(torch.int16))
print("same bits", len(bits))
"""


@pytest.mark.parametrize("level", WITHOUT, ids=lambda level: level.name)
def test_rounding_to_bfloat16_is_the_processors(level, tmp_path: Path) -> None:
    """Bit for bit PyTorch's, infinities, ties and NaN among them."""
    if level not in supported(flags_here()):
        pytest.skip(f"this processor does not run code for {level.name}")
    (tmp_path / "rounding.py").write_text(ROUNDING)  # Numba caches functions of files only
    environment = os.environ | level.environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "rounding.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "same bits 65552\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_products_and_layers_of_every_level(level) -> None:
    """What other machines will run: the tests of products and layers, compiled for them."""
    if level not in supported(flags_here()):
        pytest.skip(f"this processor does not run code for {level.name}")
    files = [f"tests/kernels/{name}.py" for name in ("test_matmul", "test_decoder_layer", "test_draft_stack")]
    environment = os.environ | level.environment()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
