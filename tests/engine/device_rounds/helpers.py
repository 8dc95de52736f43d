"""Engines whose rounds stay on the device: here the CPU, where every round is called instead of replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.device_rounds.rounds import DeviceRounds
from engine.engine import Engine
from engine.loading import load_engine


def load(target: Path, draft: Path | None = None, **options: Any) -> Engine:
    """As `tests.engine.helpers.load`, rounds on the device."""
    options.setdefault("kv_memory", 4 * 2**20)
    options.setdefault("max_model_len", 256)
    name = "none" if draft is None else str(draft)
    engine = load_engine(EngineConfig(model=str(target), draft=name, **options), device_rounds=True)
    assert engine.device_rounds is not None
    return engine


def rounds_of(engine: Engine) -> DeviceRounds:
    assert engine.device_rounds is not None
    return engine.device_rounds
