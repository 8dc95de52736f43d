"""Which kernels run where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels import device


def test_a_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_triton", lambda: False)
    assert not device.on_gpu(torch.zeros(1)) and not device.has_kernels(torch.zeros(1))


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_triton", lambda: False)
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"requirements/gpu\.txt"):
        device.has_kernels(tensor)  # type: ignore[arg-type]
    monkeypatch.setattr(device, "_triton", lambda: True)
    assert device.has_kernels(tensor)  # type: ignore[arg-type]
    tensor.dtype = torch.float64
    assert not device.has_kernels(tensor)  # type: ignore[arg-type]
