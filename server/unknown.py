"""A `grpc.aio` server that answers calls of unknown methods without looking at their path.

In grpcio 1.85 the path of such a call is decoded as UTF-8 in the server's main loop, outside of every guard: one call
with another path, from anybody who can connect, and the server listens no more. Known methods are registered, and
matched below Python. So those that match none never reach the main loop: they are answered here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import grpc
from grpc._cython import cygrpc  # type: ignore[import-not-found]  # compiled, without types
from grpc.aio._server import Server, _augment_channel_arguments  # type: ignore[import-not-found]

from server.logs import log


class _Details(NamedTuple):
    """What interceptors see of the call."""

    method: str
    invocation_metadata: Any


def tolerant_server(options: Sequence[tuple[str, Any]], interceptors: Sequence[Any]) -> grpc.aio.Server:
    """As `grpc.aio.server(options=…, interceptors=…)`; all its services must be registered by generated code.

    Interceptors see a call of an unknown method with an empty one.
    """
    made: Any = _Tolerant(options, interceptors)
    return made  # type: ignore[no-any-return]


class _Tolerant(Server):  # type: ignore[misc]
    def __init__(self, options: Sequence[tuple[str, Any]], interceptors: Sequence[Any]) -> None:
        self._loop = cygrpc.get_working_loop()
        arguments = _augment_channel_arguments(options, None)
        self._server = _Core(self._loop, None, (), tuple(interceptors), arguments, None)
        self._server.interceptors = tuple(interceptors)


class _Core(cygrpc.AioServer):  # type: ignore[misc]
    interceptors: tuple[Any, ...] = ()

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a registered method; for any other (None) a future that the main loop waits for in vain."""
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        loop = asyncio.get_running_loop()
        self._answering: set[asyncio.Task[None]] = {loop.create_task(self._answer_all())}
        return loop.create_future()

    async def _answer_all(self) -> None:
        while self.is_running():
            try:
                state = await self._request_call()
            except Exception as error:  # of several private classes: gRPC has no call for us
                if self.is_running():
                    log("no_unknown_call", level=logging.WARNING, reason=str(error))
                    await asyncio.sleep(1)
                continue
            task = asyncio.get_running_loop().create_task(self._answer(state))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, state: Any) -> None:
        context = cygrpc._ServicerContext(state, None, None, asyncio.get_running_loop())
        try:
            handler = await _ask(self.interceptors, _Details("", context.invocation_metadata()))
            if handler is not None and handler.stream_stream is not None:  # an interceptor refuses it
                await handler.stream_stream(_nothing(), context)
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
        except (grpc.aio.AbortError, cygrpc.ExecuteBatchError):
            pass  # answered; or the caller has gone


async def _ask(interceptors: Sequence[Any], details: Any) -> Any:
    """The handler that the interceptors put in place of none."""
    if not interceptors:
        return None

    async def go_on(details: Any) -> Any:
        return await _ask(interceptors[1:], details)

    return await interceptors[0].intercept_service(go_on, details)


async def _nothing() -> AsyncIterator[Any]:
    for nothing in list[Any]():
        yield nothing
