"""The scheduler of a running server, from Python: watch its rounds, read and change its policy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from dspark.v1 import scheduler_pb2 as wire
from dspark.v1 import scheduler_pb2_grpc as wire_grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from clients.client import Client, to_error

Record = dict[str, Any]
POLICY_FIELDS = tuple(field.name for field in wire.Policy.DESCRIPTOR.fields)


class Batch(NamedTuple):
    """Records that came together, oldest first, and how many before them this client was too slow for."""

    records: list[Record]
    lost: int


class SchedulerClient:
    """Calls SchedulerService over a client's connection. Every method raises ServerError."""

    def __init__(self, client: Client) -> None:
        self._stub: wire_grpc.SchedulerServiceAsyncStub = wire_grpc.SchedulerServiceStub(client.channel)
        self._client = client

    async def watch(
        self,
        *,
        every: int = 1,
        history: int = 0,
        buffer: int | None = None,
        summaries: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Batch, None]:
        """Streams records under the wire's own names, enums in lower case. Closing the generator ends the call."""
        request = wire.WatchRoundsRequest(every=every, history=history, buffer=buffer, summaries=summaries)
        call = self._stub.WatchRounds(request, timeout=timeout_s, metadata=self._client.metadata)
        try:
            async for message in call:
                yield Batch([as_dict(record) for record in message.records], message.lost)
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error
        finally:
            call.cancel()

    async def policy(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """{"policy": …, "initial": …, "names": […]}; a field that is absent is None."""
        try:
            answer = await self._stub.GetPolicy(
                wire.GetPolicyRequest(), timeout=timeout_s, metadata=self._client.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error
        return {"policy": _policy(answer.policy), "initial": _policy(answer.initial), "names": list(answer.names)}

    async def update_policy(
        self, changes: Mapping[str, Any], reset: Sequence[str] = (), *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Sets `changes`, and sets `reset` to what the server was started with; returns the whole policy."""
        request = wire.UpdatePolicyRequest(policy=wire.Policy(**changes))
        if reset:
            request.update_mask.CopyFrom(FieldMask(paths=[*changes, *reset]))
        try:
            return _policy(
                (await self._stub.UpdatePolicy(request, timeout=timeout_s, metadata=self._client.metadata)).policy
            )
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error


def _policy(message: wire.Policy) -> dict[str, Any]:
    return {name: getattr(message, name) if message.HasField(name) else None for name in POLICY_FIELDS}  # type: ignore[arg-type]


def as_dict(message: Message) -> Record:
    """A record as plain values, every field present; None for an absent one."""
    found: Record = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None:
            value = [as_dict(each) for each in value]
        elif field.enum_type is not None:
            name = field.enum_type.values_by_number[value].name
            value = name.removeprefix(f"{field.enum_type.name.upper()}_").lower()
        elif field.is_repeated:
            value = list(value)
        elif field.has_presence and not message.HasField(field.name):
            value = None
        found[field.name] = value
    return found
