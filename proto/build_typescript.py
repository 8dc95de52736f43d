"""Rebuilds the TypeScript client's code from the same .proto files; --check compares only. Needs `make typescript`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import error_details_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT.parent / "clients" / "typescript"
GENERATED = PACKAGE / "src" / "gen"
PLUGIN = PACKAGE / "node_modules" / ".bin" / "protoc-gen-ts_proto"
SOURCES = (
    "dspark/v1/generation.proto",
    "dspark/v1/scheduler.proto",
    "google/rpc/status.proto",
    "google/rpc/error_details.proto",
)
OPTIONS = (
    "env=node",
    "importSuffix=.js",  # Node resolves ES modules by their whole names
    "outputServices=grpc-js",
    "oneof=unions-value",
    "forceLong=bigint",  # seeds need all 64 bits
    "useOptionals=messages",
    "removeEnumPrefix=true",
    "outputJsonMethods=false",
)


def generate(target: Path) -> None:
    """Writes the messages and the services' stubs under `target`.

    Raises:
        RuntimeError: the generator is not installed, or protoc refused a file and says why on stderr.
    """
    if not PLUGIN.exists():
        raise RuntimeError(f"{PLUGIN.relative_to(ROOT.parent)} is missing: run `make typescript` first")
    arguments = [
        "protoc",
        f"--plugin=protoc-gen-ts_proto={PLUGIN}",
        f"--proto_path={ROOT}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--proto_path={Path(error_details_pb2.__file__).parents[2]}",
        f"--ts_proto_out={target}",
        f"--ts_proto_opt={','.join(OPTIONS)}",
        *SOURCES,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")


def stale(fresh: Path) -> list[str]:
    """Names of generated files that differ between `fresh` and the committed ones."""
    names = {path.relative_to(root) for root in (GENERATED, fresh) for path in root.rglob("*.ts")}

    def text(path: Path) -> str | None:
        return path.read_text(encoding="utf-8") if path.exists() else None

    return sorted(str(name) for name in names if text(GENERATED / name) != text(fresh / name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    try:
        if not parser.parse_args().check:
            GENERATED.mkdir(parents=True, exist_ok=True)
            generate(GENERATED)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder))
            outdated = stale(Path(folder))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if outdated:
        print("out of date, run `make proto-typescript`: " + ", ".join(outdated), file=sys.stderr)
    return bool(outdated)


if __name__ == "__main__":
    sys.exit(main())
