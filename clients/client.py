"""An async client: `async with Client("127.0.0.1:50051") as client: async for event in client.generate(…)`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc
from google.protobuf import json_format

from clients.connection import Tls, call_metadata, open_channel
from clients.errors import Cancelled, FieldViolation, ServerError, to_error
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
from clients.model_info import ModelInfo
from clients.retry import Attempts, Retry
from clients.tracing import trace_metadata

__all__ = ["Client", "Collector", "Completion", "FieldViolation", "ServerError", "to_error"]

_Ask = TypeVar("_Ask")
_Answer = TypeVar("_Answer")


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
    """Calls one server, or all that a name stands for, in turn. Every method raises ServerError.

    Args:
        address: HOST:PORT, or a gRPC name such as `dns:///dspark-headless:50051`.
        token: the bearer token, for a server that asks for one.
        tls: for a server with TLS.
        retry: what becomes of calls that nobody answered; `retry.NEVER` hands every failure on.
    """

    def __init__(
        self, address: str, *, token: str | None = None, tls: Tls | None = None, retry: Retry | None = None
    ) -> None:
        self._retry = retry or Retry()
        self._closed = False
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
        self._closed = True
        await self._channel.close(None)

    async def generate(
        self,
        prompt: Prompt,
        options: Options | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Streams the events of one generation. Failures before the first event may be tried again; later ones not.

        Closing the generator, or cancelling the task that reads it, cancels the call: the server frees the request
        within a round.

        Args:
            request_id: your name for the call, unique among those that run; empty: the server makes one.
            timeout_s: the deadline, all tries and waits together.
        """
        request = to_wire(prompt, options or Options(), request_id)
        attempts = Attempts(self._retry, timeout_s)
        while True:
            self._check_open()
            call = self._stub.Generate(request, timeout=attempts.left_s, metadata=self.metadata)
            begun = False
            last: Event | None = None
            try:
                async for response in call:
                    begun = True
                    event = from_wire(response)
                    if isinstance(event, Finished):
                        last = event  # handed out once the call has ended: the caller may stop reading at it
                    elif event is not None:
                        yield event
                if last is None:
                    raise ServerError("UNKNOWN", "the stream ended without its last message", request_id=request_id)
                yield last
                return
            except grpc.aio.AioRpcError as error:
                failure = to_error(error, request_id)
                failure.__cause__ = error
                if begun:
                    raise failure from error
            except asyncio.CancelledError:
                self._raise_if_closed(request_id)
                raise
            finally:
                call.cancel()
            await attempts.again(failure)

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
        raise AssertionError("generate() ends with its last event or an error")

    async def tokenize(
        self, text: str | Chat, *, add_special_tokens: bool | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """The prompt's token ids, as the server would use them."""
        request = wire.TokenizeRequest(add_special_tokens=add_special_tokens)
        if isinstance(text, str):
            request.text = text
        else:
            request.chat.CopyFrom(chat_to_wire(text))
        return list((await self._unary(self._stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None, timeout_s: float | None = None
    ) -> str:
        """The ids' text; bytes that form no character become U+FFFD."""
        request = wire.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._unary(self._stub.Detokenize, request, timeout_s)).text

    async def info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """GetModelInfo, as plain values under the wire's own names."""
        answer = await self._unary(self._stub.GetModelInfo, wire.GetModelInfoRequest(), timeout_s)
        info: dict[str, Any] = json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        # The JSON mapping writes 64-bit numbers as strings.
        info["parameters"] = int(info["parameters"])
        info["load"]["rounds"] = int(info["load"]["rounds"])
        return cast("ModelInfo", info)

    async def _unary(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Ask, _Answer], request: _Ask, timeout_s: float | None
    ) -> _Answer:
        attempts = Attempts(self._retry, timeout_s)
        while True:
            self._check_open()
            try:
                return await method(request, timeout=attempts.left_s, metadata=self.metadata)
            except grpc.aio.AioRpcError as error:
                failure = to_error(error)
                failure.__cause__ = error
            except asyncio.CancelledError:
                self._raise_if_closed("")
                raise
            await attempts.again(failure)

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled("CANCELLED", "this client is closed")

    def _raise_if_closed(self, request_id: str) -> None:
        """gRPC cancels a closed channel's readers as if somebody had cancelled their tasks; tells the two apart."""
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise Cancelled("CANCELLED", "the client was closed", request_id=request_id) from None
