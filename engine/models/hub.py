"""Where a checkpoint lies: a directory, or a GGUF file or hub id that becomes one. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import LoadError


def resolve(name: str, revision: str | None) -> Path:
    """A checkpoint's directory; a GGUF file is converted first, a hub id downloaded (or found in the local cache).

    Raises:
        LoadError: neither a directory, nor a GGUF file that can be converted, nor a hub id that can be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        from engine.models.gguf.convert import converted

        return converted(path)
    if path.exists():
        raise LoadError(
            f"{name} is a file; give the directory that holds config.json and *.safetensors, or a .gguf file"
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LoadError(f"no directory {name}, and it is no hub id (ORGANISATION/NAME) either")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; each means "not to be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(
            f"{name} could not be fetched from the hub ({reason}); download it and give its directory"
        ) from error
