"""What a call can fail with, as canonical status codes with google.rpc details."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

MAX_VIOLATIONS = 16  # details travel in trailing metadata, which is small
MAX_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field: its path in the request, and what to do about it."""

    field: str
    description: str


class CallError(Exception):
    """Ends a call with `code`. `details` are google.rpc messages."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Iterable[Message] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = tuple(details)


def invalid(violations: Sequence[Violation]) -> CallError:
    """INVALID_ARGUMENT that names every wrong field."""
    shown = [Violation(v.field, _clip(v.description)) for v in violations[:MAX_VIOLATIONS]]
    entry = error_details_pb2.BadRequest.FieldViolation
    entries = [entry(field=v.field, description=v.description) for v in shown]
    bad_request = error_details_pb2.BadRequest(field_violations=entries)
    message = "; ".join(f"{v.field}: {v.description}" for v in shown[:3])
    if len(violations) > 3:
        message += f"; and {len(violations) - 3} more"
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, message, [bad_request])


def queue_full(message: str, retry_after_s: float) -> CallError:
    """RESOURCE_EXHAUSTED that says when to come back."""
    delay = Duration()
    delay.FromMilliseconds(math.ceil(max(retry_after_s, 0.001) * 1000))
    return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [error_details_pb2.RetryInfo(retry_delay=delay)])


def unavailable(message: str, retry_after_s: float = 1.0) -> CallError:
    delay = Duration()
    delay.FromMilliseconds(math.ceil(retry_after_s * 1000))
    return CallError(grpc.StatusCode.UNAVAILABLE, message, [error_details_pb2.RetryInfo(retry_delay=delay)])


def already_running(request_id: str) -> CallError:
    detail = error_details_pb2.ResourceInfo(
        resource_type="dspark.v1.GenerateRequest", resource_name=request_id, description="still running"
    )
    message = f"request_id: {request_id!r} is still running; choose another or leave it empty"
    return CallError(grpc.StatusCode.ALREADY_EXISTS, message, [detail])


def not_finite(message: str) -> CallError:
    """DATA_LOSS: the model's numbers broke on this request; the weights are damaged, or the prompt overflows them.

    Not INTERNAL, which means a bug of the service, nor UNAVAILABLE: the same request would break again."""
    reason = error_details_pb2.ErrorInfo(reason="LOGITS_NOT_FINITE", domain="dspark.v1")
    return CallError(grpc.StatusCode.DATA_LOSS, message, [reason])


def undecodable() -> CallError:
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, "the message is not what this method takes")


def internal(message: str) -> CallError:
    """Something broke on our side; never for a client's mistake."""
    return CallError(grpc.StatusCode.INTERNAL, message)


def cut_off(context: grpc.aio.ServicerContext[Any, Any], elapsed_s: float) -> str:
    """The status of a call whose handler was cancelled: its deadline passed, or the client left.

    `context.cancelled()` does not tell reliably. gRPC rounds a timeout on the wire up, by 1 % at most, so that at the
    deadline it is the client who gives up first, with a little time left here.

    Args:
        elapsed_s: since the call arrived.
    """
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0.02 + 0.011 * (elapsed_s + remaining)
    return "DEADLINE_EXCEEDED" if late else "CANCELLED"


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: CallError, request_id: str = "") -> None:
    """Ends the call with the error: the rich status, when to retry, and the request's id."""
    request_id = request_id or uuid.uuid4().hex
    metadata = [*to_status(error, request_id).trailing_metadata, ("x-request-id", request_id)]
    if (pause := retry_after_ms(error)) is not None:
        metadata.append(("grpc-retry-pushback-ms", str(pause)))  # what gRPC's own retries wait for
    try:
        await context.abort(error.code, _clip(error.message, 1000), trailing_metadata=tuple(metadata))
    except grpc.aio.InternalError as left:  # nobody is there to hear it
        raise asyncio.CancelledError from left


def retry_after_ms(error: CallError) -> int | None:
    """Milliseconds after which the call may be sent again; None when that would not help."""
    for detail in error.details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            return int(detail.retry_delay.ToMilliseconds())
    return None


def to_status(error: CallError, request_id: str) -> grpc.Status:
    """The rich status, with the request's id among the details."""
    packed = []
    for detail in (*error.details, error_details_pb2.RequestInfo(request_id=request_id)):
        packed.append(Packed())
        packed[-1].Pack(detail)
    # StatusCode.value is (number, name).
    number: int = error.code.value[0]
    message = _clip(error.message, 1000)
    return rpc_status.to_status(status_pb2.Status(code=number, message=message, details=packed))


def _clip(text: str, limit: int = MAX_MESSAGE) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
