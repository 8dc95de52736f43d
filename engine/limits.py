"""How many cores and how much memory this process may use: the cgroup's word, else the machine's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # cgroup v1 writes a huge number for "no limit"


def cores(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Whole cores, at least one: the smaller of the affinity mask and the cgroup's CPU quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [available]
    for folder in _folders(root, membership, "cpu"):
        match _words(folder / "cpu.max"):
            case [quota, period] if quota != "max":
                quotas.append(math.ceil(int(quota) / int(period)))
        match _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us"):
            case [quota], [period] if int(quota) > 0:
                quotas.append(math.ceil(int(quota) / int(period)))
    return max(1, min(quotas))


def memory(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes: the smaller of the machine's memory and the cgroup's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _folders(root, membership, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            match _words(folder / name):
                case [limit] if limit != "max" and int(limit) < _UNLIMITED:
                    limits.append(int(limit))
    return min(limits)


def _folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Where limits may stand, v2 and v1: this process's groups and every group above them."""
    yield root
    yield root / controller
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root if not controllers else root / controller
        if controllers and controller not in controllers.split(","):
            continue
        folder = Path(path.lstrip("/"))
        for part in (folder, *folder.parents):
            yield base / part


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
