"""A span and a duration for every call, by the RPC semantic conventions.

The stock interceptor for grpc.aio records cancelled calls as successful and breaks streams whose handlers write.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import attach, detach
from opentelemetry.trace import SpanKind, Status, StatusCode

from server.problems import cut_off
from server.telemetry.instruments import Instruments

# gRPC semantic conventions: what counts as the server's own failure. A client's mistake or change of mind does not.
FAILURES = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
SYSTEM = {"rpc.system.name": "grpc"}
_FACTORIES: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
Context = grpc.aio.ServicerContext[Any, Any]


class CallTracing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Opens a SERVER span around each call, as a child of the caller's where its metadata names one.

    Args:
        excluded: services whose calls leave no trace.
    """

    def __init__(self, tracer: trace.Tracer, instruments: Instruments, excluded: Collection[str] = ()) -> None:
        self._tracer = tracer
        self._instruments = instruments
        self._excluded = frozenset(excluded)
        self._wrapped: dict[str, tuple[Any, Any]] = {}  # handlers by method, and what stands in for them

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Stands in for the method's handler."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method).removeprefix("/")
        if handler is None:
            self._unknown(handler_call_details.invocation_metadata)
            return None
        if method.rpartition("/")[0] in self._excluded:
            return handler
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(handler, method))
        return known[1]

    def _wrap(self, handler: Any, method: str) -> Any:
        kind = (bool(handler.request_streaming), bool(handler.response_streaming))
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if inspect.isasyncgenfunction(inner):

            async def write_all(request: Any, context: Context) -> None:
                # Writes instead of yielding: a context must be left in the task that entered it.
                with self._observing(method, context):
                    responses: AsyncIterator[Any] = inner(request, context)
                    async with aclosing(responses) as each:  # type: ignore[type-var]
                        async for response in each:
                            await context.write(response)

            behaviour: Callable[..., Awaitable[Any]] = write_all
        elif inspect.iscoroutinefunction(inner):

            async def answer(request: Any, context: Context) -> Any:
                with self._observing(method, context):
                    return await inner(request, context)

            behaviour = answer
        else:
            return handler  # a blocking one, which runs in a thread; there are none here
        return _FACTORIES[kind](
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @contextmanager
    def _observing(self, method: str, context: Context) -> Iterator[None]:
        parent = propagate.extract(_text(context.invocation_metadata() or ()))
        attributes = {**SYSTEM, "rpc.method": method, **self._instruments.address, **_peer(context.peer())}
        began = time.perf_counter()
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)
        token = attach(trace.set_span_in_context(span, parent))
        code = "OK"
        error_type: str | None = None
        try:
            yield
            code = _name(context.code()) or "OK"
        except asyncio.CancelledError:
            code = cut_off(context, time.perf_counter() - began)
            raise
        except BaseException as error:
            code = _name(context.code()) or "UNKNOWN"
            if code == "UNKNOWN":
                error_type = type(error).__qualname__
            raise
        finally:
            self._finish(span, method, code, error_type, time.perf_counter() - began, context)
            detach(token)

    def _finish(
        self, span: trace.Span, method: str, code: str, error_type: str | None, seconds: float, context: Context
    ) -> None:
        measured = {**SYSTEM, "rpc.method": method, "rpc.response.status_code": code}
        if code in FAILURES:
            measured["error.type"] = error_type or code
        self._instruments.call_duration.record(seconds, measured)
        if span.is_recording():
            span.set_attribute("rpc.response.status_code", code)
            if code in FAILURES:
                span.set_attribute("error.type", measured["error.type"])
                span.set_status(Status(StatusCode.ERROR, _details(context) if error_type is None else None))
        span.end()

    def _unknown(self, metadata: Any) -> None:
        """A call of a method that does not exist (`server.unknown` answers it). Which one, nobody looks at."""
        code = "UNIMPLEMENTED"
        measured = {**SYSTEM, "rpc.method": "_OTHER", "rpc.response.status_code": code, "error.type": code}
        parent = propagate.extract(_text(metadata or ()))
        span = self._tracer.start_span("grpc", parent, SpanKind.SERVER, {**measured, **self._instruments.address})
        span.set_status(Status(StatusCode.ERROR))
        span.end()
        self._instruments.call_duration.record(0.0, measured)


def _text(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}


def _name(code: Any) -> str | None:
    return code.name if isinstance(code, grpc.StatusCode) else None


def _details(context: Context) -> str | None:
    details = context.details()
    return details.decode("utf-8", "replace") if isinstance(details, bytes) else details or None


def _peer(peer: str) -> dict[str, str | int]:
    """The other end of the connection, from gRPC's `ipv4:127.0.0.1:50000`, `ipv6:[::1]:50000` or `unix:…`."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return {"network.peer.address": rest} if rest else {}
    host, _, port = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")
    address: dict[str, str | int] = {"network.peer.address": host.strip("[]")}
    if port.isdecimal():
        address["network.peer.port"] = int(port)
    return address
