"""A round on tensors of a GPU that is not there: everything lies on the device, and nothing needs a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import Qwen3ForCausalLM

from engine.device_rounds.round import DeviceRound, Size
from engine.device_rounds.sizing import staircase
from engine.device_rounds.state import RoundState
from engine.drafters.dspark import DSparkDrafter
from engine.models.families import load_target
from tests.engine.checkpoints import save_drafter
from tests.engine.device_rounds.fake_cuda import DEVICE, FakeCuda, fake_cuda

Drafters = Callable[..., Path]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
LAYERS, DRAFT_LAYERS, BLOCK = 4, 2, 5
DRAFTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "dflash": {"head": "none", "confidence": False},
    "anchor spent": {"changes": {"sample_from_anchor": False}},
}


def load(cuda: FakeCuda, target_dir: Path, draft_dir: Path | None) -> DeviceRound:
    """A round in bfloat16, its weights and caches on the device."""
    target = load_target(target_dir, dtype=torch.bfloat16, device=DEVICE, max_length=64)
    target.allocate(9)
    drafter = None
    if draft_dir is not None:
        drafter = DSparkDrafter(draft_dir, target)
        drafter.allocate(9)
    return DeviceRound(target, drafter, RoundState(4, 4, 0 if drafter is None else BLOCK, 8, DEVICE))


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_size_runs_on_the_device_alone(
    draft: str, target_dir: Path, hf_target: Qwen3ForCausalLM, tmp_path: Path
) -> None:
    directory = save_drafter(tmp_path, hf_target, **DRAFTS[draft])
    with fake_cuda() as cuda:
        rounds = load(cuda, target_dir, directory)
        rounds.run(Size(1, 2, True))  # what is made once is made before a capture
        cuda.capture()
        for size in staircase(4, BLOCK):
            cuda.launches.clear()
            rounds.run(size)
            counts = Counter(cuda.launches)
            assert counts["_attention"] == LAYERS + DRAFT_LAYERS * size.drafts
            assert counts["_score"] == counts["_choose"] == BLOCK * size.drafts
            assert counts["_store_context"] == DRAFT_LAYERS, "every round absorbs"
            assert counts["_select"] == size.drafts and counts["_decide"] == 1


def test_plain_rounds_without_a_drafter(target_dir: Path) -> None:
    with fake_cuda() as cuda:
        rounds = load(cuda, target_dir, None)
        cuda.capture()
        for size in staircase(4, 0):
            rounds.run(size)
        assert "_store_context" not in cuda.launches and "_attention" in cuda.launches


@pytest.mark.parametrize(
    ("offence", "error"),
    [
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: torch.ops.aten.nonzero(x), DynamicOutputShapeException),
        (lambda x: x[x > 1], AssertionError),
        (lambda x: torch.zeros(4, dtype=torch.int64) + x, Exception),
        (lambda x: torch.tensor([1]), pytest.fail.Exception),
    ],
)
def test_what_a_graph_could_not_hold_is_refused(offence: Callable[[Any], Any], error: type[Exception]) -> None:
    with fake_cuda() as cuda:
        tensor = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        cuda.capture()
        with pytest.raises(error):
            offence(tensor)
