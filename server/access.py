"""Who calls: bearer tokens checked before a handler sees anything, and who it was for the handler to ask.

Health is open to everybody, because probes carry no tokens; everything else needs one, the scheduler's service one
with admin scope.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health

from server import tokens
from server.logs import log
from server.problems import CallError, abort
from server.reload import LOOK_S, Reloading
from server.tokens import Grant, TokenTable
from server.turnstile import Turnstile

OPEN_SERVICES = frozenset({health.SERVICE_NAME})
ADMIN_SERVICES = frozenset({"dspark.v1.SchedulerService"})
_caller: ContextVar[Grant | None] = ContextVar("caller", default=None)

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


def caller() -> Grant | None:
    """Whose token the call carries that the current task handles; None where tokens are not asked for."""
    return _caller.get()


def tenant() -> str:
    """The caller's name; empty where tokens are not asked for."""
    grant = _caller.get()
    return grant.name if grant is not None else ""


def own_salt(salt: str) -> str:
    """The prefix-cache salt of a request: no two tenants share pages, whatever salts they choose."""
    grant = _caller.get()
    return f"{grant.name}\0{salt}" if grant is not None else salt


class Access(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Checks tokens, and keeps each tenant to its share.

    Args:
        path: the file of tokens, followed when it changes. A removed token ends no stream that runs.

    Raises:
        LoadError: the file cannot be used.
    """

    def __init__(self, path: Path, look_s: float = LOOK_S) -> None:
        self._table: Reloading[TokenTable] = Reloading("tokens", [path], lambda: tokens.load(path), look_s)
        self._turnstiles: dict[str, Turnstile] = {}

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        service = handler_call_details.method.lstrip("/").partition("/")[0]
        if service not in OPEN_SERVICES:
            try:
                _caller.set(self._check(service, handler_call_details.invocation_metadata))
            except CallError as error:
                log("refused", level=logging.WARNING, method=handler_call_details.method, status=error.code.name)
                return _refusing(error)
        return await continuation(handler_call_details)

    def turn(self, priority: int) -> AbstractAsyncContextManager[None]:
        """A place among the caller's generations."""
        grant = caller()
        if grant is None:
            return nullcontext()
        turnstile = self._turnstiles.setdefault(grant.name, Turnstile())
        return turnstile.turn(priority, grant.max_concurrent, grant.max_queued)

    def _check(self, service: str, metadata: Any) -> Grant:
        given = [value for key, value in metadata or () if key == "authorization"]
        if not given:
            raise _unauthenticated("no token; send the metadata `authorization: Bearer TOKEN`")
        scheme, _, token = str(given[0]).partition(" ")
        grant = self._table.get().find(token.strip()) if scheme.lower() == "bearer" and len(given) == 1 else None
        if grant is None:
            raise _unauthenticated("this token is not known here")
        if service in ADMIN_SERVICES and not grant.admin:
            raise CallError(grpc.StatusCode.PERMISSION_DENIED, f"{service} needs a token with admin scope")
        return grant


def _unauthenticated(message: str) -> CallError:
    return CallError(grpc.StatusCode.UNAUTHENTICATED, message)


def _refusing(error: CallError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, error)

    # Whatever kind the method is: the answer does not wait for a message.
    return grpc.stream_stream_rpc_method_handler(refuse)
