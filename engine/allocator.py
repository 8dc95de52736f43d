"""Memory of the process: what a round gives back is kept for the next, and caches take none before they are written."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import torch

# glibc's names and limits (malloc.h): from here on memory comes straight from the kernel, and goes straight back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 32 * 2**20
_KEPT = 256 * 2**20
_CACHE_LINE = 64


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


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that a CPU's memory holds only from where they are first written: a cache is sized for the worst load.

    torch.zeros writes all of them at once: a server that was given 6 GB for its caches had them resident at its start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _CACHE_LINE, np.uint8))  # calloc: the kernel's own zero pages
    start = -memory.data_ptr() % _CACHE_LINE
    return memory[start : start + size].view(dtype).view(shape)
