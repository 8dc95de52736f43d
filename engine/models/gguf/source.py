"""A GGUF file by its keys and tensors, as the `gguf` package reads it; what is wrong with it is said by name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import LoadError

_MAGIC = b"GGUF"
_VALUES_AT_ONCE = 2**22  # dequantised together: 16 MiB of float32, and a few times that on the way


def require_gguf() -> ModuleType:
    """The `gguf` package.

    Raises:
        LoadError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise LoadError(
            f"GGUF files need the gguf package ({error}); run `pip install -r requirements/real.txt`"
        ) from error


class Source:
    """An open GGUF file.

    Raises:
        LoadError: no GGUF file, a damaged one, one of several parts, or the `gguf` package is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror}") from error
        if magic != _MAGIC:
            raise LoadError(f"{path} is no GGUF file (it begins with {magic!r}); give a .gguf file or a directory")
        package = require_gguf()
        self._dequantize = package.dequantize
        try:
            self._reader = package.GGUFReader(path)
        except Exception as error:  # lengths out of bounds, unknown types: whatever damage leads to
            raise LoadError(f"{path} is damaged or incomplete ({error}); fetch it again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if self.get("split.count", int, 1) > 1:
            raise LoadError(f"{path} is one of several parts; join them with llama.cpp's gguf-split --merge")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; whole numbers count as float where that is asked for.

        Raises:
            LoadError: of another type, or missing without a default.
        """
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise LoadError(f"{self.path}: key {key} is missing")
            return default
        try:
            value = field.contents()
        except Exception as error:  # text that is no UTF-8
            raise LoadError(f"{self.path}: key {key} cannot be read ({error}); fetch the file again") from error
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise LoadError(f"{self.path}: key {key} must be {kind.__name__}, got {type(value).__name__}")
        return value

    def __contains__(self, key: str) -> bool:
        return self._reader.get_field(key) is not None

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, rows first, in the file's order."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def kind(self, name: str) -> str:
        """How a tensor is stored, such as Q4_K."""
        return str(self._tensors[name].tensor_type.name)

    def values(self, name: str) -> Iterator[NDArray[np.float32]]:
        """A tensor's numbers, dequantised some rows at a time.

        Raises:
            LoadError: an unknown quantisation, or numbers that are not finite.
        """
        tensor = self._tensors[name]
        rows = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
        width = max(1, int(tensor.n_elements) // len(rows))
        step = max(1, _VALUES_AT_ONCE // width)
        for start in range(0, len(rows), step):
            try:
                values = self._dequantize(np.asarray(rows[start : start + step]), tensor.tensor_type)
            except NotImplementedError as error:
                raise LoadError(
                    f"{self.path}: tensor {name} is {self.kind(name)}, which the gguf package cannot dequantise;"
                    " use a file in F32, F16, BF16, Q8_0 or a K-quant"
                ) from error
            if not np.isfinite(values).all():
                raise LoadError(f"{self.path}: tensor {name} holds numbers that are not finite; fetch the file again")
            yield values

    @property
    def bytes(self) -> int:
        return os.path.getsize(self.path)
