"""The wire contract: generated code is fresh, and names follow buf's STANDARD rules."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dspark.v1 import generation_pb2 as wire
from google.protobuf.descriptor import Descriptor

BUILD = Path(__file__).resolve().parents[2] / "proto" / "build.py"
FILE = wire.DESCRIPTOR


def test_generated_code_is_fresh() -> None:
    done = subprocess.run([sys.executable, str(BUILD), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def messages() -> Iterator[Descriptor]:
    def walk(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for nested in message.nested_types:
            yield from walk(nested)

    for message in FILE.message_types_by_name.values():
        yield from walk(message)


def test_names_follow_the_style() -> None:
    assert FILE.package == "dspark.v1"
    assert FILE.name == "dspark/v1/generation.proto"
    for message in messages():
        if not message.GetOptions().map_entry:
            assert re.fullmatch(r"[A-Z][A-Za-z0-9]*", message.name)
        for field in message.fields:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name)


def test_enum_values_carry_their_enums_name() -> None:
    for enum in FILE.enum_types_by_name.values():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert all(value.name.startswith(prefix) for value in enum.values)
        assert enum.values_by_number[0].name == prefix + "UNSPECIFIED"


def test_services_and_calls_are_named_as_pairs() -> None:
    seen: set[str] = set()
    for service in FILE.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"
            assert not seen & {method.input_type.name, method.output_type.name}
            seen |= {method.input_type.name, method.output_type.name}
