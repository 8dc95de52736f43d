"""A round never asks the device for a value, and no shape depends on one: the proof that needs no GPU.

PyTorch's operations are watched while a round runs, once by way of the CPU's kernels, once by way of the GPU's, which
Triton interprets: nothing may be read back, and no operation's output may have a size that depends on values. Inside a
kernel the interpreter may do what it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from engine import loading
from engine.device_rounds.round import Size
from engine.engine import Engine
from kernels import (
    decoder_stack,
    draft_stack,
    filters,
    markov_sample,
    noise,
    rms_norm,
    select_lengths,
    store_kv,
    verify,
)
from tests.engine.device_rounds.helpers import load, rounds_of
from tests.engine.helpers import coupled, rejection, request, run

Drafters = Callable[..., Path]
WRAPPERS = (decoder_stack, draft_stack, filters, markov_sample, noise, rms_norm, select_lengths, store_kv, verify)
# Operations that wait for values, or whose output is as large as values say.
FORBIDDEN = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "argwhere",
    "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "repeat_interleave", "lift_fresh",
    "_pin_memory", "masked_scatter",
}  # fmt: skip
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets what a GPU would run")
READS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")


class NoWaiting(TorchDispatchMode):
    """Fails on what a graph could not hold."""

    def __init__(self, natively: bool) -> None:
        super().__init__()
        self.forbidden = FORBIDDEN - {"lift_fresh"} if natively else FORBIDDEN
        self.operations: set[str] = set()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations.add(name)
        assert name not in self.forbidden, f"{func} waits for the device"
        if name.startswith("index"):
            chosen = [i for each in args[1:2] if isinstance(each, list | tuple) for i in each if i is not None]
            assert not any(i.dtype in (torch.bool, torch.uint8) for i in chosen), "a mask's size depends on its values"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch, natively: bool = False) -> Iterator[NoWaiting]:
    """What is seen. Values may be read inside kernels alone.

    Args:
        natively: kernels are the CPU's, which take a tensor's values as NumPy's and make tensors of theirs.
    """
    inside: list[bool] = []
    mode = NoWaiting(natively)

    def guarded(own: Any, name: str) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            assert inside, f"Tensor.{name} reads values"
            return own(self, *args, **kwargs)

        return read

    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        mode.launches += 1
        try:
            with _disable_current_modes():
                return launch(self, *args, **kwargs)
        finally:
            inside.pop()

    with monkeypatch.context() as patch:
        for name in READS:
            if not (natively and name == "numpy"):
                patch.setattr(torch.Tensor, name, guarded(getattr(torch.Tensor, name), name))
        for name in ("tensor",) if natively else ("tensor", "from_numpy"):
            patch.setattr(torch, name, lambda *a, **k: pytest.fail("the round makes tensors of the host's values"))
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        with mode:
            yield mode


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch and native code are out of the wrappers' reach: a CPU's tensors pass for a GPU's."""
    monkeypatch.setattr(loading, "row_invariant", lambda target: False)  # what start measures takes an interpreter long
    for module in WRAPPERS:
        for name in ("reference", "run_layers", "verify_arrays", "sample_frame", "_filter_rows"):
            monkeypatch.setattr(module, name, None, raising=False)
        for name in ("has_kernels", "on_gpu"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda x: True)


def served(target_dir: Path, drafter: Path | None, **options: Any) -> Engine:
    """An engine whose target and drafter run by the GPU's kernels: native code knows no float16."""
    return load(target_dir, drafter, dtype="float16", policy="fixed", max_running=4, max_model_len=64, **options)


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ("vanilla", Size(2, 7, True)),
        ("vanilla", Size(2, 2, False)),
        ("rnn", Size(2, 7, True)),
        pytest.param("gated", Size(2, 7, True), marks=pytest.mark.slow),
        pytest.param("none", Size(2, 7, True), marks=pytest.mark.slow),
    ],
)
def test_a_round_on_a_gpus_kernels_waits_for_nothing(
    head: str, size: Size, target_dir: Path, drafter_dir: Drafters, on_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rounds_of(served(target_dir, drafter_dir(head=head, confidence=head != "none"))).graphs._run
    with no_waiting(monkeypatch) as seen:
        run(size)
    assert {"searchsorted", "cumsum", "index", "cummax"} <= seen.operations
    assert seen.launches > (40 if size.drafts else 20)


def test_nor_does_it_without_a_drafter_or_on_a_cpus_kernels(
    target_dir: Path, drafter_dir: Drafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    for drafter, sizes in ((None, [Size(2, 2, False)]), (drafter_dir(), [Size(2, 7, True), Size(2, 2, False)])):
        rounds = rounds_of(load(target_dir, drafter, max_running=4))
        for size in sizes:
            rounds.graphs._run(size)  # heads are packed once, as before a capture
            with no_waiting(monkeypatch, natively=True):
                rounds.graphs._run(size)


@pytest.mark.parametrize("drafted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_texts_of_a_gpus_kernels_are_those_of_rounds_that_the_host_runs(
    drafted: bool, target_dir: Path, drafter_dir: Drafters, on_triton: None
) -> None:
    """Seated sequences, prompts of several pages, filters, whole blocks: by Triton in both ways to run a round."""
    todo = [request("a", range(17), 3), request("b", [9], 4, coupled(2, top_k=5))]
    if drafted:
        todo.append(request("c", [5, 6], 4, coupled(4), rejection()))
    found = []
    for host in (False, True):
        engine = served(target_dir, drafter_dir() if drafted else None)
        rounds_of(engine).paused = host
        found.append({name: result.tokens for name, result in run(engine, todo).items()})
        assert bool(rounds_of(engine).seating.launched) is not host
    assert {name: found[0][name] for name in "ab"} == {name: found[1][name] for name in "ab"}


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.tolist(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 1),
        lambda x: torch.tensor([1, 2]),
        lambda x: torch.from_numpy(np.zeros(2)),
        lambda x: x.repeat_interleave(x),
        lambda x: x.index_put_((x > 1,), torch.zeros(())),
        lambda x: x.unique(),
    ],
)
def test_the_watch_notices(offence: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)), no_waiting(monkeypatch):
        offence(torch.arange(4))
