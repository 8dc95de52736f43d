"""Sends hostile messages to a server and judges its answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import scheduler_pb2 as admin
from google.protobuf.message import Message

from tests.fuzz import messages
from tests.fuzz.wire import attack, strike

CALL_S = 60.0  # an answer that takes longer is a hang
WATCH_S = 0.1  # as long is looked at a stream that does not end by itself
WIRE_SHARE, BROKEN_SHARE = 0.02, 0.3
# A client's mistake is never one of these.
FAULTS = frozenset({"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"})

# Whoever may set them may keep others out with them; that must not hide what others find.
_LIMITS_AS_STARTED = admin.UpdatePolicyRequest(
    update_mask={"paths": ["max_running", "prefill_chunk", "max_queue"]}
).SerializeToString()


@dataclass
class Outcome:
    """What the server answered."""

    sent: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # how to repeat them

    def as_json(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "codes": dict(self.codes.most_common()),
            "kinds": dict(self.by_kind),
            "faults": self.faults[:20],
            "ok": not self.faults,
        }


def services() -> list[Any]:
    """Every service of ours that there is."""
    return [service for file in (wire, admin) for service in file.DESCRIPTOR.services_by_name.values()]


async def fuzz(
    address: str, count: int, seed: int, concurrent: int = 16, metadata: Sequence[tuple[str, str]] = ()
) -> Outcome:
    """`count` messages; message k of a seed is always the same."""
    outcome = Outcome()
    paths = messages.methods(services())
    numbers = iter(range(count))
    async with grpc.aio.insecure_channel(address) as channel:

        async def worker() -> None:
            for number in numbers:
                await _one(
                    channel, address, paths, random.Random(f"{seed}/{number}"), f"{seed}/{number}", outcome, metadata
                )

        await asyncio.gather(*(worker() for _ in range(concurrent)))
    return outcome


async def _one(
    channel: grpc.aio.Channel,
    address: str,
    paths: list[tuple[str, type[Message], bool]],
    rng: random.Random,
    name: str,
    outcome: Outcome,
    metadata: Sequence[tuple[str, str]],
) -> None:
    path, kind, streams = rng.choice(paths)
    data = messages.hostile(kind, rng).SerializeToString()
    outcome.sent += 1
    draw = rng.random()
    if draw < WIRE_SHARE:
        outcome.by_kind["raw bytes"] += 1
        host, _, port = address.rpartition(":")
        await strike(host, int(port), attack(rng, path, data))
        return
    label = "hostile values"
    if draw < WIRE_SHARE + BROKEN_SHARE:
        label, data = "broken encoding", messages.broken(data, rng)
    elif draw < WIRE_SHARE + BROKEN_SHARE + 0.01:
        label, data = "deep nesting", messages.nested(rng.choice([5, 31, 33, 60, 99, 200, 2000]))
    elif draw < WIRE_SHARE + BROKEN_SHARE + 0.03:  # another method's message
        label, data = "wrong type", messages.hostile(rng.choice(paths)[1], rng).SerializeToString()
    outcome.by_kind[label] += 1
    make = channel.unary_stream if streams else channel.unary_unary
    call: Any = make(path)(data, timeout=CALL_S, metadata=tuple(metadata))
    if streams:
        taken = 0
        if kind is not wire.GenerateRequest:
            asyncio.get_running_loop().call_later(WATCH_S, call.cancel)
        try:
            async for _ in call:
                taken += 1
                if taken >= 40 or (rng.random() < 0.02):  # what is endless, or simply left
                    call.cancel()
                    break
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
    code = (await call.code()).name
    outcome.codes[code] += 1
    if kind is admin.UpdatePolicyRequest and code == "OK":
        await channel.unary_unary(path)(_LIMITS_AS_STARTED, timeout=CALL_S, metadata=tuple(metadata))
    if code in FAULTS:
        outcome.faults.append(f"{name} {path} {label}: {code} {await call.details()}")
