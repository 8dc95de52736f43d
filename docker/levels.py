"""For which processors the image carries native code. Imports nothing but the standard library.

Numba compiles for exactly the processor it runs on, and keeps the result under that processor's name: what was
compiled where the image was built would be useless elsewhere. So the image is compiled for a few levels that every
server processor of the last ten years has one of.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Level:
    """`flags`: what /proc/cpuinfo must list. `cpu` and `features`: LLVM's names."""

    name: str
    flags: frozenset[str]
    cpu: str
    features: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """What makes Numba compile for this level."""
        return {"NUMBA_CPU_NAME": self.cpu, "NUMBA_CPU_FEATURES": ",".join(self.features)}


_V3_FLAGS = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "popcnt", "xsave"})
# All of them by name, although the level's name implies them: kernels/processor.py looks for names.
_V3 = tuple(f"+{name}" for name in ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt", "xsave"))
_V4_FLAGS = _V3_FLAGS | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4 = (*_V3, "+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl", "-prefer-256-bit")
_DOT_FLAGS = _V4_FLAGS | {"avx512_vnni", "avx512_bf16"}
_DOT = (*_V4, "+avx512vnni", "+avx512bf16")
_TILE_FLAGS = _DOT_FLAGS | {"amx_tile", "amx_bf16"}
_TILE = (*_DOT, "+amx-tile", "+amx-bf16")

LEVELS = (  # the best first
    Level("x86-64-v4 with AMX", _TILE_FLAGS, "x86-64-v4", _TILE),
    Level("x86-64-v4 with AVX512-BF16", _DOT_FLAGS, "x86-64-v4", _DOT),
    Level("x86-64-v4", _V4_FLAGS, "x86-64-v4", _V4),
    Level("x86-64-v3", _V3_FLAGS, "x86-64-v3", _V3),
)


def supported(flags: Iterable[str]) -> list[Level]:
    """The levels that a processor with these flags can run, the best first."""
    here = frozenset(flags)
    return [level for level in LEVELS if level.flags <= here]


def flags_here(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """This machine's flags; none where that is not an x86."""
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())
