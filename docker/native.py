"""Compiles the native code into the image, while it is built: `python -m docker.native`.

For every level that this machine can run, by decoding a few tokens with the embedded model in every way there is.
A machine that meets no level compiles at its first start, as it does outside the image.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from docker.levels import Level, flags_here, supported

DEMO = Path(__file__).resolve().parent.parent / "engine" / "demo"


def compile_here(dtype: str) -> None:
    """Compiles for what the environment names, into the cache that kernels/jit.py chooses."""
    from engine.config import EngineConfig
    from engine.loading import load_engine, warm_up

    target, draft = str(DEMO / "target"), str(DEMO / "dspark")
    config = EngineConfig(model=target, draft=draft, dtype=dtype, threads=2, kv_memory=2**25, cost_cache="")
    warm_up(load_engine(config))


def compile_level(level: Level) -> None:
    """Compiles for one level, in processes of their own: Numba's target belongs to the process.

    Raises:
        subprocess.CalledProcessError: it failed; its own message is on stderr.
    """
    dtypes = ["float32", *(["bfloat16"] if "+avx512bf16" in level.features else [])]
    for dtype in dtypes:
        command = [sys.executable, "-m", "docker.native", dtype]
        subprocess.run(command, env={**os.environ, **level.environment()}, check=True)


def main(arguments: list[str]) -> int:
    if arguments:
        compile_here(arguments[0])
        return 0
    levels = supported(flags_here())
    for level in levels:
        began = time.monotonic()
        compile_level(level)
        print(f"native code for {level.name}: {time.monotonic() - began:.0f} s", flush=True)
    if not levels:
        print("no level fits this machine: the image carries no native code, and its first start compiles", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
