"""Data-parallel workers: started by us (gloo on CPU) or by torchrun, and what they tell each other."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from engine.training.trainable import Metrics


@dataclass(frozen=True)
class Worker:
    """This process among all."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: Tensor) -> Tensor:
        """This worker's consecutive rows; the row count must divide."""
        return value.chunk(self.count)[self.rank]

    def agree(self, value: float) -> float:
        """The leader's value, for everyone."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def add_gradients(self, model: nn.Module, clip: float) -> float:
        """Replace every gradient by the sum over workers, clipped to norm `clip`; returns the norm before."""
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        if self.count > 1:
            dist.all_reduce(flat)
        norm = float(flat.norm())
        flat *= min(1.0, clip / (norm + 1e-6))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return norm

    def add_metrics(self, metrics: Metrics) -> Metrics:
        """Sums and weights over all workers."""
        if self.count == 1:
            return metrics
        names = sorted(metrics)
        flat = torch.cat([part.double().flatten() for name in names for part in metrics[name]])
        dist.all_reduce(flat)
        out: Metrics = {}
        for name in names:
            size, shape = metrics[name][0].numel(), metrics[name][0].shape
            total, weight, flat = flat[:size], flat[size : 2 * size], flat[2 * size :]
            out[name] = total.view(shape), weight.view(shape)
        return out


def device_of(name: str, rank: int) -> torch.device:
    """`auto` is a GPU where there is one; each worker has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"cuda:{rank % torch.cuda.device_count()}" if name == "cuda" else name)


def _enter(
    rank: int, count: int, meeting: str, device: str, threads: int, work: Callable[..., None], args: Any
) -> None:
    torch.set_num_threads(threads)
    place = device_of(device, rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count > 1:
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=count)
    try:
        work(Worker(rank, count, place), *args)
        if count > 1:
            dist.barrier()  # who leaves first would close connections that others still use
    finally:
        if count > 1:
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a worker's process here and now.

    The interpreter's own end stops threads of the communication library in the middle of C++ frames, which now and
    then aborts a process whose work is done. What Python itself has to tidy up, it does: semaphores, helper processes.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _enter_and_leave(*arguments: Any) -> None:
    _enter(*arguments)
    leave(0)


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(work: Callable[..., None], args: tuple[Any, ...], count: int, device: str, threads: int) -> None:
    """Run work(worker, *args) in every worker; under torchrun this process is one of them already."""
    if under_torchrun():
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        _enter(rank, count, "env://", device, threads, work, args)
    elif count == 1:
        _enter(0, 1, "", device, threads, work, args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_enter_and_leave, args=(count, f"file://{folder}/meet", device, threads, work, args), nprocs=count)
