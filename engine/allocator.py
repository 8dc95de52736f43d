"""The C library's allocator keeps what a round gives back, for the next round to take."""

from __future__ import annotations

import ctypes
import platform

# glibc's names and limits (malloc.h): from here on memory comes straight from the kernel, and goes straight back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 32 * 2**20
_KEPT = 256 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB of freed memory. Without glibc nothing changes.

    A round's logits are megabytes that live for milliseconds. Otherwise every round asks the kernel for them anew, and
    pays for each of their pages when it is first written: 519 page faults instead of 3, and 0.2 ms of 2.8 of the host's
    work, in a round of whole blocks for 64 requests of the embedded model.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
