"""Rebuilds the Python code beside the .proto files: `python proto/build.py`, or with --check, compares only."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Writes messages, service classes and their type stubs under `target`.

    Raises:
        RuntimeError: protoc refused a file; its own message is on stderr.
    """
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    # The type stubs' plugins stand beside the interpreter that runs this, which PATH need not name.
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        *plugins,
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")


def stale(fresh: Path) -> list[str]:
    """Names of generated files that differ between `fresh` and the committed ones."""
    names = {path.relative_to(root) for root in (ROOT, fresh) for pattern in GENERATED for path in root.rglob(pattern)}

    def text(path: Path) -> str | None:
        return path.read_text() if path.exists() else None

    return sorted(str(name) for name in names if text(ROOT / name) != text(fresh / name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        outdated = stale(Path(folder))
    if outdated:
        print("out of date, run `make proto`: " + ", ".join(outdated), file=sys.stderr)
    return bool(outdated)


if __name__ == "__main__":
    sys.exit(main())
