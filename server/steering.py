"""Policies and decision records: protobuf to plain values and back. Every wrong field is named, all of them at once."""

from __future__ import annotations

from typing import Any

from dspark.v1 import scheduler_pb2 as wire

from engine.config import EngineConfig
from engine.messages import PolicySettings
from engine.schedule.steering import STEERABLE, problems, settings
from server.convert import Violations
from server.rounds import Record

MOST_HISTORY, MOST_BUFFERED, BUFFERED = 512, 4096, 512
_WIRE_NAMES = {"policy": "name"}  # Policy.policy would say it twice
FIELDS = {_WIRE_NAMES.get(name, name): name for name in STEERABLE}  # on the wire, and in the engine
_ROUND_FIELDS = tuple(f.name for f in wire.RoundRecord.DESCRIPTOR.fields if f.name not in ("stop", "requests"))
_REQUEST_FIELDS = tuple(f.name for f in wire.RequestRecord.DESCRIPTOR.fields if f.name != "sitting")


def to_changes(message: wire.UpdatePolicyRequest, start: EngineConfig, block_size: int) -> dict[str, Any]:
    """The changes that a request asks for, by the engine's names.

    Args:
        start: what the engine was started with.
        block_size: γ, 0 without a drafter.

    Raises:
        CallError: INVALID_ARGUMENT, naming each wrong field.
    """
    bad = Violations()
    given = {name: getattr(message.policy, name) for name in FIELDS if message.policy.HasField(name)}  # type: ignore[arg-type]  # the stub lists literals
    if message.HasField("update_mask"):
        initial = settings(start, drafts=block_size > 0)
        chosen: dict[str, Any] = {}
        for index, path in enumerate(message.update_mask.paths):
            if path not in FIELDS:
                bad.add(f"update_mask.paths[{index}]", f"{path!r} is not one of {', '.join(FIELDS)}")
            else:
                chosen[path] = given.get(path, getattr(initial, FIELDS[path]))
        given = chosen
    if not given and not bad.found:
        bad.add("policy", f"nothing to change; set one of {', '.join(FIELDS)}, or name it in update_mask")
    changes = {FIELDS[name]: value for name, value in given.items()}
    for name, mend in problems(changes, start, block_size):
        bad.add(f"policy.{_WIRE_NAMES.get(name, name)}", mend)
    bad.check()
    return changes


def policy(values: PolicySettings) -> wire.Policy:
    return wire.Policy(**{name: getattr(values, field) for name, field in FIELDS.items()})


def to_watch(message: wire.WatchRoundsRequest) -> tuple[int, int]:
    """(every, buffer) of a watcher.

    Raises:
        CallError: INVALID_ARGUMENT, naming each wrong field.
    """
    bad = Violations()
    bad.number("history", message.history, 0, MOST_HISTORY)
    buffer = message.buffer if message.HasField("buffer") else BUFFERED
    bad.number("buffer", buffer, 1, MOST_BUFFERED)
    bad.check()
    return max(message.every, 1), buffer


def round_record(record: Record, *, summary: bool) -> wire.RoundRecord:
    """A record as it travels; `summary` leaves its requests out."""
    found = wire.RoundRecord(**{name: record[name] for name in _ROUND_FIELDS if name in record})
    found.stop = _number(wire.Stop, record["stop"])
    if not summary:
        for request in record["requests"]:
            values = {name: request[name] for name in _REQUEST_FIELDS if name in request}
            found.requests.add(**values, sitting=_number(wire.Sitting, request["sitting"]))
    return found


def _number(enum: Any, name: str) -> Any:
    """An enum's value by the engine's name; UNSPECIFIED for one that the wire has no word for."""
    return dict(enum.items()).get(f"{enum.DESCRIPTOR.name.upper()}_{name.upper()}", 0)
