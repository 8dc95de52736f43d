"""The C library's allocator keeps what a round gives back, for the next round to take."""

from __future__ import annotations

import ctypes
import platform

MEBIBYTE = 2**20
# glibc's names and limits (malloc.h): from here on memory comes straight from the kernel, and goes straight back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 32 * MEBIBYTE
_KEPT = 256 * MEBIBYTE


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB of freed memory; False where the C library is not glibc, and nothing changed.

    A round's logits are megabytes that live for milliseconds. Otherwise every round asks the kernel for them anew, and
    pays for each of their pages when it is first written: 0.2 ms of 2.8 of a round's host work at 64 requests.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
