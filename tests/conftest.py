"""Fixtures that every test may use: tiny random checkpoints in the real formats, built once a session."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # transformers takes seconds to import: only tests that use a fixture below pay for it
    from transformers import Qwen3ForCausalLM

VOCAB = 96

# Read when Triton is imported: its kernels are interpreted where torch finds no GPU.
if not Path("/dev/nvidiactl").exists() or "+cpu" in version("torch"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def hf_target() -> Qwen3ForCausalLM:
    """The tiny target as transformers runs it: the oracle."""
    import torch

    from tests.engine.checkpoints import make_target

    torch.set_num_threads(1)
    return make_target(vocab=VOCAB)


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory, hf_target: Qwen3ForCausalLM) -> Path:
    from tests.engine.checkpoints import save_target

    return save_target(tmp_path_factory.mktemp("target"), hf_target)


@pytest.fixture(scope="session")
def drafter_dir(tmp_path_factory: pytest.TempPathFactory, hf_target: Qwen3ForCausalLM) -> Callable[..., Path]:
    """`drafter_dir(head="gated", with_markov=False)`: a DSpark drafter for the tiny target, made once each."""
    from tests.engine.checkpoints import save_drafter

    made: dict[tuple[tuple[str, object], ...], Path] = {}

    def build(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = save_drafter(tmp_path_factory.mktemp("drafter"), hf_target, **options)  # type: ignore[arg-type]
        return made[key]

    return build


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Prompts of many lengths: one token, around a page, several pages."""
    generator = random.Random(7)
    lengths = (1, 2, 7, 15, 16, 17, 33, 50, 64, 70)
    return [tuple(generator.randrange(VOCAB) for _ in range(length)) for length in lengths]
