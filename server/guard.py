"""Messages that cannot be decoded end as INVALID_ARGUMENT; left to gRPC they look like a fault of the server."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from server.access import Continuation
from server.logs import log
from server.problems import abort, undecodable

_BROKEN = object()


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Decodes for every handler."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        return _guarded(handler, handler_call_details.method) if handler is not None else None


def _guarded(handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    decode = handler.request_deserializer
    codec = {
        "request_deserializer": _tolerant(decode) if decode is not None else None,
        "response_serializer": handler.response_serializer,
    }

    async def refuse(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        log("undecodable", level=logging.WARNING, method=method)
        await abort(context, undecodable())

    if handler.request_streaming:
        behave = handler.stream_stream or handler.stream_unary

        async def decoded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async for request in requests:
                if request is _BROKEN:
                    await refuse(context)
                yield request

        async def stream(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async for response in behave(decoded(requests, context), context):
                await context.write(response)

        async def gather(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await behave(decoded(requests, context), context)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                stream if inspect.isasyncgenfunction(behave) else gather, **codec
            )
        return grpc.stream_unary_rpc_method_handler(gather, **codec)
    behave = handler.unary_stream or handler.unary_unary

    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _BROKEN:
            await refuse(context)
        return await behave(request, context)

    async def answer_many(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _BROKEN:
            await refuse(context)
        async for response in behave(request, context):
            await context.write(response)

    if handler.response_streaming:
        many = answer_many if inspect.isasyncgenfunction(behave) else answer
        return grpc.unary_stream_rpc_method_handler(many, **codec)
    return grpc.unary_unary_rpc_method_handler(answer, **codec)


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def attempt(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception:
            return _BROKEN

    return attempt
