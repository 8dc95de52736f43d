"""Hostile messages, made from the descriptors of whatever services there are: new fields are fuzzed by being there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor as pb
from google.protobuf.message import Message

_INT = {
    "int32": (-(2**31), 2**31 - 1),
    "uint32": (0, 2**32 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint64": (0, 2**64 - 1),
}
_KINDS = {
    pb.FieldDescriptor.CPPTYPE_INT32: "int32",
    pb.FieldDescriptor.CPPTYPE_UINT32: "uint32",
    pb.FieldDescriptor.CPPTYPE_INT64: "int64",
    pb.FieldDescriptor.CPPTYPE_UINT64: "uint64",
    pb.FieldDescriptor.CPPTYPE_ENUM: "int32",
}
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-300, 1e300, 3.5e38, float("nan"), float("inf"), float("-inf"), 2.0**53)
_WORDS = (
    *("", "\0", "a", "user", "system", "villain", "request-1", "x" * 129, "y" * 5000, "é" * 300, "\u202e\ufeff"),
    *(
        "🙂" * 40,
        "漢字",
        "<|im_start|>",
        "{{ 7 * 7 }}",
        "../../etc/passwd",
        "%s%n",
        "\r\n",
        "\ud7ff",
        "import os\n" * 20,
    ),
)
_MAX_TOKENS = 6  # what is valid after all must not run long


def value(field: pb.FieldDescriptor, rng: random.Random, depth: int) -> Any:
    """One hostile value of a field that is no message."""
    kind = field.cpp_type
    if kind in _KINDS:
        low, high = _INT[_KINDS[kind]]
        if kind == pb.FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([0, 1, 2, 3, 7, -1, high])
        return rng.choice([0, 1, 2, 5, rng.randint(low, high), high, low, high // 2, rng.randrange(5000)])
    if kind in (pb.FieldDescriptor.CPPTYPE_DOUBLE, pb.FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(_FLOATS)
    if kind == pb.FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == pb.FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.randrange(40))
    return rng.choice(_WORDS)


def fill(message: Message, rng: random.Random, share: float = 0.35, depth: int = 0) -> None:
    """Sets a random share of the fields."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > share or depth > 6:
            continue
        count = rng.choice([0, 1, 2, 3, 20]) if field.is_repeated else 1
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(count):
                key_field, value_field = field.message_type.fields
                key = value(key_field, rng, depth)
                if value_field.message_type is not None:
                    fill(target[key], rng, share, depth + 1)
                else:
                    target[key] = value(value_field, rng, depth)
        elif field.message_type is not None:
            for _ in range(count):
                child = target.add() if field.is_repeated else target
                if not field.is_repeated:
                    child.SetInParent()
                fill(child, rng, share, depth + 1)
        elif field.is_repeated:
            target.extend(value(field, rng, depth) for _ in range(count))
        else:
            setattr(message, field.name, value(field, rng, depth))


def hostile(kind: type[Message], rng: random.Random) -> Message:
    """A message of valid form; where it may pass as a request, it is a short one."""
    message = kind()
    fill(message, rng, share=rng.choice([0.1, 0.35, 0.8]))
    names = {field.name for field in message.DESCRIPTOR.fields}
    if "max_tokens" in names:
        if rng.random() < 0.5:  # an almost right one: a single wrong field among right ones
            only = rng.choice(sorted(names))
            for name in names - {only}:
                message.ClearField(name)
        if "text" in names and message.WhichOneof("prompt") is None and rng.random() < 0.8:  # type: ignore[arg-type]
            message.text = rng.choice(_WORDS)  # type: ignore[attr-defined]
        message.max_tokens = min(max(message.max_tokens, rng.randrange(2)), _MAX_TOKENS)  # type: ignore[attr-defined]
        message.min_tokens = min(message.min_tokens, rng.choice([0, _MAX_TOKENS, 2**32 - 1]))  # type: ignore[attr-defined]
    return message


def broken(data: bytes, rng: random.Random) -> bytes:
    """Bytes that hardly decode: cut, flipped, mixed, or random."""
    match rng.randrange(5):
        case 0:
            return data[: rng.randrange(len(data) + 1)]
        case 1 if data:
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case 2:
            return rng.randbytes(rng.randrange(200))
        case 3:
            at = rng.randrange(len(data) + 1)
            return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        case _:
            return data * rng.randrange(4) + b"\x0a\xff\xff\xff\xff\x0f"  # a field that claims 4 GiB


def nested(depth: int) -> bytes:
    """GenerateRequest.chat.template_arguments, a Struct nested `depth` deep, by hand: the library would refuse to."""
    inner = b""
    for _ in range(depth):
        # Value{struct_value=5}, then Struct.fields{key "a", value}
        item = _field(2, _field(5, inner))
        inner = _field(1, _field(1, b"a") + item)
    return _field(4, _field(1, _field(1, b"user")) + _field(2, inner))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def methods(services: Sequence[pb.ServiceDescriptor]) -> list[tuple[str, type[Message], bool]]:
    """Every method: its path, its request's class, whether it answers with a stream."""
    from google.protobuf import message_factory

    return [
        (
            f"/{service.full_name}/{method.name}",
            message_factory.GetMessageClass(method.input_type),
            method.server_streaming,
        )
        for service in services
        for method in service.methods
    ]
