"""How native code is compiled and kept. Numba and LLVM only: no C compiler is needed.

Numba's own cache looks at the file of the cached function and misses changes in the files that it calls into.
Here the key is a digest of that file and of all kernel sources that it imports, however indirectly: an edit to any
of them recompiles, and a stale cache cannot bite.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import Cache

from kernels.processor import may_use_tiles

log = logging.getLogger("dspark.kernels")
_HERE = Path(__file__).resolve().parent


def native(function: Callable[..., Any]) -> Any:
    """A helper that other native code calls; it is compiled with its callers."""
    # Division by zero gives infinity instead of raising: native code has no exceptions.
    dispatcher = numba.njit(error_model="numpy", nogil=True)(function)
    resolve = dispatcher.get_call_template

    def resolve_plainly(args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
        # Numba would compile a version for every literal argument; one for all integers will do.
        plain = {name: types.unliteral(kind) for name, kind in kws.items()}
        return resolve(tuple(types.unliteral(kind) for kind in args), plain)

    dispatcher.get_call_template = resolve_plainly
    return dispatcher


def _sources(path: Path) -> dict[str, bytes]:
    """The file and the kernel files that it imports, name -> content."""
    found: dict[str, bytes] = {}
    waiting = [path]
    while waiting:
        source = waiting.pop()
        if source.name in found or not source.exists():
            continue
        found[source.name] = source.read_bytes()
        for module, names in re.findall(rb"^from kernels(?:\.(\w+))? import ([\w, ]*)", found[source.name], re.M):
            imported = [module] if module else re.findall(rb"(\w+)(?: as \w+)?", names)
            waiting += [_HERE / f"{name.decode()}.py" for name in imported]
    return found


@functools.cache
def _cache_directory(path: str) -> str:
    digest = hashlib.sha256(f"{numba.__version__} {may_use_tiles()}".encode())
    for name, content in sorted(_sources(Path(path)).items()):
        digest.update(name.encode() + content)
    name = digest.hexdigest()[:16]
    beside = _HERE / "__pycache__"
    if os.access(_HERE, os.W_OK):
        beside.mkdir(exist_ok=True)
    if os.access(beside, os.W_OK):
        return str(beside / f"native-{name}")
    return str(Path(tempfile.gettempdir()) / f"native-{os.getuid()}-{name}")


@contextmanager
def _forgiving(_cache: Any) -> Iterator[None]:
    """Around each look into the cache and each entry: a full disk or a damaged file costs compiling again, no more."""
    try:
        yield
    except Exception as error:
        log.warning("native code cannot be kept or found (%s: %s)", type(error).__name__, error)


Cache._guard_against_spurious_io_errors = _forgiving


@contextmanager
def _our_cache(function: Callable[..., Any]) -> Iterator[None]:
    """Numba decides where a function's cache lies when it is decorated."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _cache_directory(function.__code__.co_filename)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def entry(function: Callable[..., Any]) -> Any:
    """A native function that Python calls; compiled at the first call, then cached on disk."""
    with _our_cache(function):
        return numba.njit(error_model="numpy", nogil=True, cache=True)(function)


def routine(function: Callable[[Any, Any], None]) -> Callable[[], int]:
    """A native function of two integers that other native code calls by address.

    Returns a function that compiles it when first called, or takes it from the cache, and gives the address.
    """

    @functools.cache
    def address() -> int:
        with _our_cache(function):
            signature = types.void(types.int64, types.int64)
            compiled = numba.cfunc(signature, error_model="numpy", nopython=True, cache=True)(function)
        return int(compiled.address)

    return address
