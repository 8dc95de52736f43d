"""CUDA tensors without a GPU: they have shapes and a device, and no values. Launches of Triton's kernels are noted.

PyTorch's FakeTensorMode refuses operations that read values or whose shapes depend on them, and those that mix devices.
A few bindings of a PyTorch without CUDA refuse the device before the mode is asked; they are replaced here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from triton.runtime import interpreter

from engine.models.loader import Checkpoint

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)


@dataclass
class FakeCuda:
    """What a block under it may do: at first load weights, then only what a graph can hold."""

    mode: FakeTensorMode
    patch: pytest.MonkeyPatch
    launches: list[str] = field(default_factory=list)

    def capture(self) -> None:
        """From here on the host's values, and its tensors, are out of reach."""
        self.mode.allow_non_fake_inputs = False
        self.patch.setattr(torch.Tensor, "__float__", lambda tensor: pytest.fail("a value is read"))
        for name in ("tensor", "from_numpy", "as_tensor"):
            self.patch.setattr(torch, name, lambda *a, **k: pytest.fail("a tensor is made of the host's values"))


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = FakeCuda(mode, patch)
        take = Checkpoint.take
        get, put = torch.Tensor.__getitem__, torch.Tensor.__setitem__

        def really(*args: Any, **kwargs: Any) -> torch.Tensor:
            with unset_fake_temporarily():
                return take(*args, **kwargs)

        def launcher(self: Any, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                for tensor in args:
                    if isinstance(tensor, torch.Tensor):
                        assert tensor.device == DEVICE, f"{self.fn.__name__} is given a tensor of {tensor.device}"
                found.launches.append(self.fn.__name__)

            return launch

        patch.setattr(Checkpoint, "take", really)
        patch.setattr(interpreter.InterpretedFunction, "__getitem__", launcher)
        patch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)
        patch.setattr(torch.Tensor, "__float__", lambda tensor: 0.0)
        patch.setattr(torch.Tensor, "__invert__", lambda tensor: aten.bitwise_not(tensor))
        patch.setattr(torch.Tensor, "__getitem__", lambda t, key: _get(t, key) if _fake(t) else get(t, key))
        patch.setattr(torch.Tensor, "__setitem__", lambda t, k, v: _put(t, k, v) if _fake(t) else put(t, k, v))
        yield found


def _fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _get(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(each, torch.Tensor) for each in keys):
        assert all(each.dtype == torch.int64 for each in keys), "a mask's size depends on its values"
        chosen: torch.Tensor = aten.index(tensor, list(keys))
        return chosen
    dim = 0
    for number, each in enumerate(keys):
        if each is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif each is Ellipsis:
            dim = tensor.dim() - sum(other is not None for other in keys[number + 1 :])
        elif isinstance(each, slice):
            tensor, dim = aten.slice(tensor, dim, each.start, each.stop, each.step or 1), dim + 1
        else:
            tensor = tensor.select(dim, int(each))
    return tensor


def _put(tensor: torch.Tensor, key: Any, value: Any) -> None:
    where = _get(tensor, key)
    if isinstance(value, torch.Tensor):
        assert value.device == where.device, "devices are mixed"
        aten.copy_(where, value)
    else:
        aten.fill_(where, value)
