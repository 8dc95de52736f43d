"""Memory of the process: what a round frees is kept for the next, and large caches are there where they are used."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence

import numpy as np
import torch

# glibc's names and limits (malloc.h): from here on memory comes straight from the kernel, and goes straight back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 32 * 2**20
_KEPT = 256 * 2**20
_CACHE_LINE = 64
_AT_ONCE = 256 * 2**20  # bytes of caches that are there from the start
_SMALLEST_PAGE = 4096


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


def take_at_once(tensors: Sequence[torch.Tensor], most_bytes: int = _AT_ONCE) -> None:
    """Have the first `most_bytes` of these zeros on demand now, of each an equal share; what they hold stays.

    What is used first comes from there. The kernel hands a large array out in pieces of 2 MB, and clears each when it
    is first written, 0.6 ms on one machine: a prompt's new page in every cache held all requests up by 5 to 25 ms,
    and the scheduler took that for the price of drafting.
    """
    share = min(most_bytes / max(sum(tensor.nbytes for tensor in tensors), 1), 1.0)
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.view(-1).view(torch.uint8)[: int(tensor.nbytes * share) : _SMALLEST_PAGE].bitwise_or_(0)
