"""What a call can fail with. Catch ServerError for all of it, or the one that you can do something about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request, by its path."""

    field: str
    description: str


class ServerError(Exception):
    """A call that the server, or the way to it, ended with an error.

    Attributes:
        code: the canonical code's name, such as INVALID_ARGUMENT.
        retry_after_s: the server's wish, in seconds, if it has one.
        request_id: the call's name in the server's log and traces; empty when the call never got there unnamed.
        attempts: how many times the call was sent.
    """

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
        self.attempts = 1


class InvalidArgument(ServerError):
    """The request is wrong; `violations` name the fields. Sending it again will not help."""


class AlreadyRunning(ServerError):
    """Another call under this request id has not ended."""


class ResourceExhausted(ServerError):
    """The queue is full (then `retry_after_s` says when to come back), or a limit of size or share is exceeded."""


class Unavailable(ServerError):
    """Nobody there, or on the way out, or starting the engine again: another server, or a later time, may do."""


class DeadlineExceeded(ServerError):
    """The time that the call was given is over. The server has dropped the request."""


class NotAllowed(ServerError):
    """No token, a wrong one, or one that may not do this."""


class Cancelled(ServerError):
    """The call was ended from this side, by closing the client."""


_KINDS: dict[str, type[ServerError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "ALREADY_EXISTS": AlreadyRunning,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAUTHENTICATED": NotAllowed,
    "PERMISSION_DENIED": NotAllowed,
    "CANCELLED": Cancelled,
}


def make_error(
    code: str,
    message: str,
    violations: tuple[FieldViolation, ...] = (),
    retry_after_s: float | None = None,
    request_id: str = "",
) -> ServerError:
    """The error of the code's own kind, or a plain ServerError."""
    return _KINDS.get(code, ServerError)(code, message, violations, retry_after_s, request_id)


def to_error(error: grpc.aio.AioRpcError, request_id: str = "") -> ServerError:
    """Unpacks a failed call. `request_id` stands in where the server, or what is between, did not name the call."""
    violations: list[FieldViolation] = []
    retry_after_s = None
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())  # the stub says otherwise
    for key, value in metadata:
        if key == "x-request-id" and isinstance(value, str):
            request_id = value
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        for detail in _details(value):
            bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad):
                violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
            elif detail.Unpack(named := error_details_pb2.RequestInfo()):
                request_id = named.request_id
    message = error.details() or ""
    return make_error(error.code().name, message, tuple(violations), retry_after_s, request_id)


def _details(value: bytes) -> list[status_pb2.Any]:
    try:
        return list(status_pb2.Status.FromString(value).details)
    except DecodeError:  # a proxy's own idea of details; code and message still stand
        return []
