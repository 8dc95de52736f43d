"""GGUF file in, checkpoint directory out: converted once, kept in the user's cache folder.

The folder's name holds the file's SHA-256, so that another file, or the same one changed, is another conversion.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import LoadError
from engine.models.gguf.gemma3 import read_config, tensor_targets
from engine.models.gguf.source import Source
from engine.models.gguf.vocabulary import generation_config, read_tokenizer, tokenizer_config

FORMAT = 1  # of what conversion writes: another one converts anew
STAMP = "source.json"
NOTICE = "NOTICE"
_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n\n"
    "Modified: the weights in this folder were dequantised to bfloat16 from {name} (SHA-256 {digest}).\n"
)
Say = Callable[[str], None]


def converted(path: Path, *, cache: Path | None = None, say: Say | None = None) -> Path:
    """The checkpoint that a GGUF file holds, converted where that was not done before.

    Args:
        cache: the folder to keep conversions in; the user's cache folder by default (XDG_CACHE_HOME).
        say: takes lines of progress; stderr by default.

    Raises:
        LoadError: a damaged or foreign file, or a cache that cannot be written; says what to do.
    """
    return convert(path, digest_of(path), cache=cache, say=say)


def convert(
    path: Path, digest: str, *, cache: Path | None = None, say: Say | None = None, beside: Iterable[Path] = ()
) -> Path:
    """As `converted`, for a file whose SHA-256 is known; `beside` are files (terms, notices) to keep with it."""
    place = kept(path.name, digest, cache=cache)
    if is_whole(place, digest):
        return place
    say = say or _to_stderr
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place.parent.with_suffix(".lock")):
            if is_whole(place, digest):  # somebody else's, by now
                return place
            partial = place.with_name(f".{place.name}.partial")
            for folder in (partial, place):
                shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
            _write(path, digest, partial, say, beside)
            partial.rename(place)
    except OSError as error:
        raise LoadError(
            f"{path} cannot be converted into {place}: {error}; make room there, or name another cache folder in"
            " XDG_CACHE_HOME"
        ) from error
    say(f"converted {path.name}: kept in {place}")
    return place


def kept(name: str, digest: str, *, cache: Path | None = None) -> Path:
    """Where the conversion of a file lies, or will lie."""
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark-serve" / "gguf"
    return cache / digest[:16] / Path(name).stem


def is_whole(place: Path, digest: str) -> bool:
    """Whether a conversion of this digest, by this version, lies there."""
    try:
        stamp = json.loads((place / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = isinstance(stamp, dict) and stamp.get("format") == FORMAT and stamp.get("sha256") == digest
    return whole and all((place / name).is_file() for name in stamp.get("files", ("model.safetensors",)))


def digest_of(path: Path) -> str:
    """A file's SHA-256 in hex.

    Raises:
        LoadError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, digest: str, folder: Path, say: Say, beside: Iterable[Path]) -> None:
    say(f"converting {path.name}: reading its keys")
    source = Source(path)
    config = read_config(source)
    tokenizer = read_tokenizer(source)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise LoadError(f"{path}: more tokens than rows of token_embd.weight ({config['vocab_size']})")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _json(folder / "config.json", config)
    _json(folder / "tokenizer_config.json", tokenizer_config(source))
    _json(folder / "generation_config.json", generation_config(source))
    (folder / NOTICE).write_text(_GEMMA_NOTICE.format(name=path.name, digest=digest), encoding="utf-8")
    for extra in beside:
        shutil.copyfile(extra, folder / extra.name)
    _write_weights(source, folder / "model.safetensors", say)
    files = sorted(file.name for file in folder.iterdir())
    _json(
        folder / STAMP,
        {"format": FORMAT, "source": path.name, "bytes": source.bytes, "sha256": digest, "files": files},
    )


def _write_weights(source: Source, path: Path, say: Say) -> None:
    """model.safetensors in bfloat16, a few rows at a time: a header of names, shapes and places, then the numbers."""
    targets, shapes = tensor_targets(source), source.tensors
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    place = 0
    for name, target in targets.items():
        end = place + 2 * sizes[name]
        header[target.name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    total, done, told = sum(sizes.values()), 0, 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, target) in enumerate(targets.items(), 1):
            for values in source.values(name):
                file.write(to_bfloat16(values + np.float32(target.offset)))
                done += values.size
                if (share := 100 * done // max(total, 1)) >= told + 10:
                    told = share - share % 10
                    say(f"converting {source.path.name}: {share} % of the weights, tensor {index} of {len(targets)}")
        file.flush()
        os.fsync(file.fileno())


def to_bfloat16(values: NDArray[np.float32]) -> bytes:
    """Finite numbers rounded to nearest, ties to even, little-endian."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").tobytes()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
