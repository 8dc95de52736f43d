"""The wire contract is held by buf: its style, and what clients of a released version rely on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"
BUF = Path(sys.executable).parent / "buf"
GENERATION = Path("dspark/v1/generation.proto")


def buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    return buf(folder, "breaking", "--against", "released.binpb")


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A copy of the .proto files to spoil."""
    shutil.copytree(PROTO, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.py*"))
    return tmp_path


def test_style_and_compatibility() -> None:
    for done in (buf(PROTO, "lint"), breaking(PROTO)):
        assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("string request_id = 1;", "string request_name = 1;", "request_id"),
        ("string request_id = 1;", "bytes request_id = 1;", "changed type"),
        ("string request_id = 1;", "string request_id = 99;", "Previously present field"),
        ("rpc Tokenize(", "rpc Split(", "Tokenize"),
        ("FINISH_REASON_LENGTH", "FINISH_REASON_TOO_LONG", "FINISH_REASON_LENGTH"),
        ("package dspark.v1;", "package dspark.v2;", "package"),
    ],
)
def test_a_change_that_breaks_clients_is_refused(edited: Path, old: str, new: str, says: str) -> None:
    path = edited / GENERATION
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    done = breaking(edited)
    assert done.returncode == 100 and says in done.stdout, done.stdout + done.stderr


def test_additions_are_welcome(edited: Path) -> None:
    """A field, and a service in a file of its own."""
    path = edited / GENERATION
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("string request_id = 1;", "string request_id = 1;\n  string note = 999;", 1))
    (edited / "dspark/v1/extra.proto").write_text(
        'syntax = "proto3";\npackage dspark.v1;\n'
        "service ExtraService {\n  rpc Ask(AskRequest) returns (AskResponse);\n}\n"
        "message AskRequest {}\nmessage AskResponse {}\n"
    )
    assert breaking(edited).returncode == 0


def test_bad_style_is_refused(edited: Path) -> None:
    path = edited / GENERATION
    path.write_text(path.read_text(encoding="utf-8").replace("string request_id = 1;", "string requestId = 1;", 1))
    done = buf(edited, "lint")
    assert done.returncode == 100 and "requestId" in done.stdout
