"""Which class serves which `architectures` entry of config.json."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.errors import LoadError
from engine.models.decoder import DecoderModel
from engine.models.gemma3 import Gemma3Model
from engine.models.loader import read_json
from engine.models.qwen3 import Qwen3Model
from kernels.simd import HAS_DOT

FAMILIES: dict[str, type[DecoderModel]] = {
    name: family for family in (Qwen3Model, Gemma3Model) for name in family.ARCHITECTURES
}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(name: str, directory: Path, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own; on CPU bfloat16 where the processor multiplies it, else float32."""
    if name != "auto":
        return _DTYPES[name]
    config = read_json(directory / "config.json")
    own = _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)
    if device.type == "cpu" and not (own == torch.bfloat16 and HAS_DOT):
        return torch.float32
    return own


def load_target(directory: Path, *, dtype: torch.dtype, device: torch.device, max_length: int | None) -> DecoderModel:
    """The target that a directory holds.

    Raises:
        LoadError: an architecture that is not served, or a checkpoint that does not fit.
    """
    names = read_json(directory / "config.json").get("architectures") or ["none"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise LoadError(f"{directory}: architecture {names[0]} is not served; served are {', '.join(FAMILIES)}")
    return family(directory, dtype=dtype, device=device, max_length=max_length)
