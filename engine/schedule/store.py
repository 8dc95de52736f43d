"""Where measured cost tables are kept: one small JSON file a (model, drafter, dtype, device, threads, versions).

A file that cannot be read or written is never an error: the table is measured again, and a warning says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import EngineConfig
from engine.messages import EngineInfo
from engine.schedule.cost import CostTable

FORMAT = 1
_ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger("dspark.schedule")


def cache_folder(config: EngineConfig) -> Path | None:
    """Where tables lie; None when the configuration wants none."""
    if config.cost_cache is not None:
        return Path(config.cost_cache) if config.cost_cache else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dspark-serve" / "cost"


def key_of(config: EngineConfig, info: EngineInfo) -> dict[str, Any]:
    """What a table depends on; two engines with equal keys share one."""
    return {
        "format": FORMAT,
        "model": info.model,
        "parameters": info.parameters,
        "max_model_len": info.max_model_len,
        "drafter": info.drafter,
        "draft_model": info.draft_model,
        "block_size": info.block_size,
        "head": info.head,
        "has_confidence": info.has_confidence,
        "dtype": info.dtype,
        "device": _device(info.device),
        "threads": info.threads,
        "max_running": config.max_running,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "code": _code(),
    }


def load(folder: Path, key: dict[str, Any]) -> CostTable | None:
    """The table stored under this key; None when there is none, or none that can be used."""
    path = _path(folder, key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("cost table %s cannot be read (%s); measuring again", path, error)
        return None
    try:
        stored = json.loads(text)
        if stored["key"] != key:
            raise ValueError("it belongs to another engine")
        return decode(stored["table"])
    except (ValueError, TypeError, KeyError) as error:
        log.warning("cost table %s is unusable (%s); measuring again", path, error)
        return None


def save(folder: Path, key: dict[str, Any], table: CostTable) -> None:
    """Write the table; other processes see the old file or the whole new one."""
    path = _path(folder, key)
    part: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, suffix=".part", delete=False) as file:
            part = Path(file.name)
            json.dump({"key": key, "table": asdict(table)}, file)
        os.replace(part, path)
    except OSError as error:
        if part is not None:  # a full disk needs no half a table
            with suppress(OSError):
                part.unlink()
        log.warning("cost table cannot be kept in %s (%s); it will be measured at every start", folder, error)


def decode(stored: dict[str, Any]) -> CostTable:
    """A table from its JSON form.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    values: dict[str, Any] = {}
    for field in fields(CostTable):
        value = stored[field.name] if field.default is MISSING else stored.get(field.name, field.default)
        value = list(value) if isinstance(value, tuple) else value
        values[field.name] = tuple((float(x), float(y)) for x, y in value) if isinstance(value, list) else float(value)
    return CostTable(**values)


def _path(folder: Path, key: dict[str, Any]) -> Path:
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return folder / f"{digest}.json"


def _device(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(name))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model} {platform.machine()}"


def _code() -> str:
    """Digest of the sources that set the speed: a table from before a faster kernel is no use."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("kernels", "engine", "engine/drafters", "engine/models", "engine/schedule"):
        for path in sorted((_ROOT / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
