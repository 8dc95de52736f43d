"""An async client: `async with Client("127.0.0.1:50051") as client: async for event in client.generate(…)`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

from clients.connection import Tls, call_metadata, open_channel
from clients.events import (
    Chat,
    Delta,
    Event,
    Finished,
    Options,
    Prompt,
    TokenLogprob,
    chat_to_wire,
    from_wire,
    to_wire,
)
from clients.tracing import trace_metadata


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request, by its path."""

    field: str
    description: str


class ServerError(Exception):
    """A call that the server, or the way to it, ended with an error."""

    def __init__(
        self,
        code: str,
        message: str,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole generation. Times are the client's own."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished
    ttft_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ids) / self.total_s if self.total_s else 0.0


class Collector:
    """Adds events up to a Completion."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None
        self._deltas: list[Delta] = []

    def add(self, event: Event) -> Completion | None:
        """Takes one event; the last one gives the whole."""
        now = time.monotonic()
        if isinstance(event, Delta):
            if self._first is None and event.token_ids:
                self._first = now
            self._deltas.append(event)
        if not isinstance(event, Finished):
            return None
        return Completion(
            text="".join(delta.text for delta in self._deltas),
            token_ids=tuple(token for delta in self._deltas for token in delta.token_ids),
            logprobs=tuple(logprob for delta in self._deltas for logprob in delta.logprobs),
            finished=event,
            ttft_s=(self._first or now) - self._began,
            total_s=now - self._began,
        )


class Client:
    """Calls one server. Every method raises ServerError.

    Args:
        token: the bearer token, for a server that asks for one.
        tls: for a server with TLS.
    """

    def __init__(self, address: str, *, token: str | None = None, tls: Tls | None = None) -> None:
        self._channel = open_channel(address, tls)
        self._metadata = call_metadata(address, token, tls)
        self._stub: wire_grpc.GenerationServiceAsyncStub = wire_grpc.GenerationServiceStub(self._channel)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection, for other services at the same address."""
        return self._channel

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries: the token, and the application's trace where it has one."""
        return (*self._metadata, *trace_metadata())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what runs, and disconnects."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: Prompt,
        options: Options | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Streams the events of one generation. Closing the generator cancels the call."""
        request = to_wire(prompt, options or Options(), request_id)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self.metadata)
        last: Event | None = None
        try:
            async for response in call:
                event = from_wire(response)
                if isinstance(event, Finished):
                    last = event  # handed out once the call has ended: the caller may stop reading at it
                else:
                    yield event
            if last is not None:
                yield last
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error
        finally:
            call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        options: Options | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Completion:
        """Generates, and returns the whole."""
        collector = Collector()
        async with aclosing(self.generate(prompt, options, request_id=request_id, timeout_s=timeout_s)) as events:
            async for event in events:
                if (completion := collector.add(event)) is not None:
                    return completion
        raise ServerError("UNKNOWN", "the stream ended without its last message")

    async def tokenize(self, text: str | Chat, *, add_special_tokens: bool | None = None) -> list[int]:
        """The prompt's token ids, as the server would use them."""
        request = wire.TokenizeRequest(add_special_tokens=add_special_tokens)
        if isinstance(text, str):
            request.text = text
        else:
            request.chat.CopyFrom(chat_to_wire(text))
        try:
            return list((await self._stub.Tokenize(request, metadata=self.metadata)).token_ids)
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        request = wire.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        try:
            return (await self._stub.Detokenize(request, metadata=self.metadata)).text
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error

    async def info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """GetModelInfo, as plain values under the wire's own names."""
        try:
            request = wire.GetModelInfoRequest()
            answer = await self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from error
        info: dict[str, Any] = json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        # The JSON mapping writes 64-bit numbers as strings.
        info["parameters"] = int(info["parameters"])
        info["load"]["rounds"] = int(info["load"]["rounds"])
        return info


def to_error(error: grpc.aio.AioRpcError) -> ServerError:
    """Unpacks the google.rpc details of a failed call."""
    violations: list[FieldViolation] = []
    retry_after_s = None
    request_id = ""
    metadata = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())  # the stub says otherwise
    for key, value in metadata:
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            bad, retry, named = (
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
                error_details_pb2.RequestInfo(),
            )
            if detail.Unpack(bad):
                violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
            elif detail.Unpack(named):
                request_id = named.request_id
    message = error.details() or ""
    return ServerError(error.code().name, message, tuple(violations), retry_after_s, request_id)
