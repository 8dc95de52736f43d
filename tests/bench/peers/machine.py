"""The machine that figures were taken on: what it is, and what its memory gives."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.bench.measure import seconds

BYTES = 1 << 29


def describe(threads: int) -> dict[str, Any]:
    return {
        "name": "machine",
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "instructions": _instructions(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_1min": round(os.getloadavg()[0], 2),
    }


def read_gb_s(threads: int) -> float:
    """Gigabytes a second of reading half a gigabyte that no cache holds: the best of five passes of two kinds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.ones(BYTES // 4 // 4096, 4096)
        vector = torch.ones(4096)
        passes = [seconds(work) for _ in range(5) for work in (lambda: matrix @ vector, matrix.sum)]
    finally:
        torch.set_num_threads(before)
    return BYTES / min(passes) / 1e9


def weight_bytes(directory: Path, dtype: str) -> int:
    """What one step must read: all weights, without an input embedding that is not also the head."""
    item = {"float32": 4, "bfloat16": 2}[dtype]
    tied = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__" or ("embed_tokens" in name and not tied):
                continue
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count * item
    return total


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores" if named else platform.machine()


def _instructions() -> list[str]:
    """Those that decide how fast products of low precision are."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if f" {flag} " in f"{text} "]
