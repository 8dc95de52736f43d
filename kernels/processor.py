"""What the processor offers to native code, and the system lets this process use."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys

import llvmlite.binding as llvm
import numba

log = logging.getLogger("dspark.kernels")
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: asm/prctl.h


def has_feature(name: str) -> bool:
    """Whether native code is compiled for a CPU that has this feature (LLVM's name, avx512f for instance)."""
    named = numba.config.CPU_FEATURES  # what NUMBA_CPU_FEATURES asks to compile for, if it is set
    return f"+{name}" in named if named else bool(llvm.get_host_cpu_features().get(name, False))


@functools.cache
def may_use_tiles() -> bool:
    """Whether there are matrix tiles of bfloat16 (AMX) for this process; Linux wants to be asked before their first
    use, once for all threads."""
    if not (has_feature("amx-tile") and has_feature("amx-bf16")) or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return True
    log.warning("the processor's AMX is not used, the system refuses it: %s", os.strerror(ctypes.get_errno()))
    return False
