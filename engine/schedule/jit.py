"""Compiles the decisions: Numba functions of this folder, cached on disk until one of its sources changes."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_HERE = Path(__file__).resolve().parent


def native(function: Callable[..., Any]) -> Any:
    """A helper that other native code calls; it is compiled with its callers."""
    return numba.njit(error_model="numpy")(function)


@functools.cache
def _cache_directory() -> str:
    """Named after all native sources: Numba itself would look at the called function's file alone."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in [*sorted(_HERE.glob("native_*.py")), _HERE.parents[1] / "kernels" / "arrays.py"]:
        digest.update(path.name.encode() + path.read_bytes())
    name = digest.hexdigest()[:16]
    beside = _HERE / "__pycache__"
    if os.access(_HERE, os.W_OK):
        beside.mkdir(exist_ok=True)
    if os.access(beside, os.W_OK):
        return str(beside / f"native-{name}")
    return str(Path(tempfile.gettempdir()) / f"native-{os.getuid()}-{name}")  # docker/start.py looks for this name


def entry(function: Callable[..., Any]) -> Any:
    """A native function that Python calls; compiled at the first call, then taken from the cache.

    It keeps Python's lock: to let go of it for some microseconds would invite others to hold it for milliseconds.
    """
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _cache_directory()  # Numba looks when a function is decorated
    try:
        return numba.njit(error_model="numpy", cache=True)(function)
    finally:
        numba.config.CACHE_DIR = before
