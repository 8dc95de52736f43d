"""The cache of native code on a disk that is full, and one that was cut short: compiled again, nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
sys.path.insert(0, {root!r})
from kernels import jit
jit._cache_directory = lambda path: {cache!r}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))

@jit.entry
def twice(x):
    return 2 * x

@jit.entry
def thrice(x):
    return 3 * x

print(twice(21), thrice(21))
"""


def run(tmp_path: Path, limit: int) -> tuple[str, str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), cache=str(tmp_path / "cache"), limit=limit))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_full_disk_and_damaged_files(tmp_path: Path) -> None:
    out, errors = run(tmp_path, limit=100)
    assert (out, "cannot be kept" in errors) == ("42 63\n", True)
    assert run(tmp_path, limit=2**20)[0] == "42 63\n"
    for damaged in ("twice*.nbi", "thrice*.nbc"):
        (file,) = (tmp_path / "cache").rglob(f"*{damaged}")
        file.write_bytes(file.read_bytes()[:20])
    assert run(tmp_path, limit=2**20)[0] == "42 63\n"
