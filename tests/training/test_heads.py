"""Adding a head design: one class, registered by name, is trained, exported and served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.drafters.heads import HEADS, SequentialHead, register
from engine.loading import load_engine
from engine.training.loop import train
from engine.training.plan import Plan
from engine.types import EndConditions, Request, Sampling, Speculation, SpeculationMode


@pytest.fixture
def mixed() -> Iterator[str]:
    """The README's example: a latent that adds a projection of the hidden state."""

    @register("mixed")
    class Mixed(SequentialHead):
        def build(self, rank: int, width: int) -> None:
            self.mix = nn.Linear(width, rank)

        def step(self, state: Tensor, low: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return low + torch.tanh(self.mix(hidden)), state

    yield "mixed"
    del HEADS["mixed"]


def decode(plan: Plan, draft: str) -> list[int]:
    engine = load_engine(EngineConfig(str(plan.target), draft, kv_memory=2**22, max_model_len=128))
    engine.submit(Request("r", (5, 6, 7), EndConditions(16), Sampling(1.0, seed=3), Speculation(SpeculationMode.FIXED)))
    return [token for _ in range(40) if engine.has_work for delta in engine.step() for token in delta.tokens]


def test_a_new_head_is_one_class(make_plan: Callable[..., Plan], mixed: str) -> None:
    plan = make_plan("run.steps=2", f"model.head={mixed}")
    folder = train(plan)
    engine = load_engine(EngineConfig(str(plan.target), str(folder), kv_memory=2**22, max_model_len=128))
    assert engine.info.head == mixed and engine.info.has_confidence
    assert decode(plan, str(folder)) == decode(plan, "none"), "a head changes what is drafted, never the text"


@pytest.mark.parametrize("name", ["vanilla", "gated", "rnn"])
def test_the_module_and_the_kernel_draft_the_same(make_plan: Callable[..., Plan], name: str) -> None:
    """The trained module, run as a design without a kernel, against the kernel of the same name."""
    plan = make_plan("run.steps=2", f"model.head={name}", "optim.adam_lr=0.05")
    folder = train(plan)
    blocks = []
    for custom in (False, True):
        engine = load_engine(EngineConfig(str(plan.target), str(folder), kv_memory=2**22, max_model_len=128))
        drafter = engine.drafter
        if custom:
            head = HEADS[name](96, 8, 32)
            from safetensors.torch import load_file

            tensors = load_file(folder / "model.safetensors")
            for key, own in head.named_parameters():
                own.data = tensors[f"markov_head.{key}"].float()
            drafter.heads = replace(drafter.heads, kind="custom", step=head.step)  # type: ignore[union-attr]
            drafter.whole = None  # type: ignore[union-attr]  # was made for the head that came with the files
        engine.submit(Request("r", (5, 6, 7), EndConditions(8), Sampling(0.0), Speculation(SpeculationMode.FIXED)))
        while not engine.running or engine.running[0].kv_length < 3:
            engine.step()
        blocks.append(drafter.propose(engine.scheduler.choose_drafting(engine.running)))  # type: ignore[union-attr]
    assert torch.equal(blocks[0].tokens, blocks[1].tokens)
    assert torch.allclose(blocks[0].confidence, blocks[1].confidence, atol=1e-4)
