"""What the service needs of a checkpoint: tokenizer, chat template, and what absent sampling fields mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from engine.messages import Sampling
from server.chat import TemplateSource
from server.convert import MAX_REPETITION, MAX_TEMPERATURE, MIN_REPETITION, MIN_TEMPERATURE
from server.tokenizer import Tokenizer, TokenizerError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The text side of a served model."""

    tokenizer: Tokenizer
    template: TemplateSource | None
    sampling: Sampling  # for fields that a request leaves out

    @classmethod
    def load(cls, directory: Path) -> Checkpoint:
        """Reads a Hugging Face directory.

        Raises:
            LoadError: a missing or unusable file, named.
        """
        try:
            tokenizer = Tokenizer.load(directory)
        except TokenizerError as error:
            raise LoadError(str(error)) from error
        try:
            template = TemplateSource.load(directory)
        except (ValueError, OSError, KeyError) as error:
            raise LoadError(f"{directory}: chat template or tokenizer_config.json: {error}") from error
        return cls(tokenizer, template, default_sampling(directory))


def default_sampling(directory: Path) -> Sampling:
    """Sampling by `generation_config.json`; neutral where it says nothing, greedy where it says not to sample.

    Raises:
        LoadError: not JSON, or a value that no request could ask for.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return Sampling()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        greedy = config.get("do_sample") is False
        lowest = 0.0 if config.get("temperature") == 0 else MIN_TEMPERATURE
        return Sampling(
            temperature=0.0 if greedy else _number(config, "temperature", 1.0, lowest, MAX_TEMPERATURE),
            top_k=int(_number(config, "top_k", 0, 0, 2**63)),
            top_p=_number(config, "top_p", 1.0, 1e-9, 1.0),
            min_p=_number(config, "min_p", 0.0, 0.0, 1.0),
            repetition_penalty=_number(config, "repetition_penalty", 1.0, MIN_REPETITION, MAX_REPETITION),
        )
    except (ValueError, TypeError, OSError) as error:
        raise LoadError(f"{path}: {error}") from error


def _number(config: dict[str, Any], name: str, absent: float, low: float, high: float) -> float:
    value = config.get(name)
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return value
