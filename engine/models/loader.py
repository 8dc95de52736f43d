"""Reads checkpoints in the Hugging Face layout: config.json and safetensors, whole or sharded.

Knows files and tensor names; knows no model family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import LoadError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LoadError: missing, unreadable or no object, naming the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} must hold a JSON object")
    return value


class Checkpoint:
    """Tensors of one checkpoint directory by name, read on demand.

    Raises:
        LoadError: no weights, a broken file, or an index that names a file that is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self._taken: set[str] = set()
        for path in self._files():
            try:
                with safe_open(str(path), framework="pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise LoadError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise LoadError(f"{index} has no weight_map")
            paths = [self.directory / name for name in sorted(set(names.values()))]
        else:
            paths = [self.directory / "model.safetensors"]
        for path in paths:
            if not path.exists():
                raise LoadError(f"{path} is missing; the checkpoint needs it (safetensors weights)")
        return paths

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, checked against the shape that config.json implies, converted to `dtype`.

        Raises:
            LoadError: missing, or of another shape; names the tensor.
        """
        tensor = self._read(name, shape)
        if not tensor.is_floating_point():
            raise LoadError(f"{self.directory}: tensor {name} is {tensor.dtype}; only floating point is served")
        return tensor if dtype is None else tensor.to(dtype)

    def take_integers(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name` of integers or booleans, as int64.

        Raises:
            LoadError: missing, of another shape, or of numbers that are not whole; names the tensor.
        """
        tensor = self._read(name, shape)
        if tensor.is_floating_point() or tensor.is_complex():
            raise LoadError(f"{self.directory}: tensor {name} is {tensor.dtype}; it must hold integers")
        return tensor.to(torch.int64)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._file_of:
            raise LoadError(f"{self.directory}: tensor {name} is missing")
        with safe_open(str(self._file_of[name]), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise LoadError(
                f"{self.directory}: tensor {name} has shape {list(tensor.shape)}, config.json implies {list(shape)}"
            )
        self._taken.add(name)
        return tensor

    def refuse_leftovers(self, ignore: tuple[str, ...] = (), beginnings: tuple[str, ...] = ()) -> None:
        """Every tensor must have been taken: an unknown one means the architecture is not what it seems.

        Args:
            ignore: ends of names that may stay.
            beginnings: beginnings of names that may stay.

        Raises:
            LoadError: names the first tensor nobody asked for.
        """
        rest = sorted(n for n in self._file_of if n not in self._taken and not n.endswith(ignore))
        rest = [name for name in rest if not name.startswith(beginnings)]
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            raise LoadError(f"{self.directory}: tensor {rest[0]}{more} has no place in this architecture")


def setting(config: dict[str, Any], name: str, kind: type, source: Path, default: Any = None) -> Any:
    """A typed value of config.json.

    Raises:
        LoadError: missing without a default, or of another type; names the key.
    """
    value = config.get(name, default)
    if value is None:
        raise LoadError(f"{source / 'config.json'}: {name} is missing")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise LoadError(f"{source / 'config.json'}: {name} must be {kind.__name__}, got {value!r}")
    return value
