"""`dspark.v1.GenerationService`: admits calls, moves messages, and never lets one call hurt another."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
from dspark.v1 import generation_pb2 as wire
from dspark.v1 import generation_pb2_grpc as wire_grpc

from engine.errors import InvalidRequest, QueueFull
from server.access import Access, tenant
from server.bounds import Bounds
from server.checkpoint import Checkpoint
from server.convert import Prepared, check_request_id, to_detokenize, to_request
from server.generation import Generation
from server.logs import log
from server.problems import (
    CallError,
    Violation,
    abort,
    already_running,
    cut_off,
    internal,
    invalid,
    queue_full,
    unavailable,
)
from server.prompts import LONG_TEXT, Prompts
from server.replies import model_info
from server.streams import EngineFailed, SlowClient, Stalled, StallGuard
from server.telemetry import OFF, GenerationWatch, Telemetry
from server.template_process import Renderer
from server.worker import Worker

Answering = Callable[[str, str, grpc.aio.ServicerContext[Any, Any]], AbstractAsyncContextManager[Any]]
SERVICE_NAME: str = wire.DESCRIPTOR.services_by_name["GenerationService"].full_name
STALL_S = 30.0  # a client that takes no message for this long is gone
DEFAULT_BOUNDS = Bounds()
_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Call:
    """One call's name and what its log line says."""

    method: str
    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    fields: dict[str, Any] = field(default_factory=dict)


class GenerationService(wire_grpc.GenerationServiceServicer):
    """The handlers. `draining` refuses new generations; `active` are the ones still running, as tenant/request."""

    def __init__(
        self,
        worker: Worker,
        checkpoint: Checkpoint,
        *,
        stall_s: float = STALL_S,
        bounds: Bounds = DEFAULT_BOUNDS,
        renderer: Renderer | None = None,
        access: Access | None = None,
        telemetry: Telemetry = OFF,
    ) -> None:
        self._worker = worker
        self._telemetry = telemetry
        self._checkpoint = checkpoint
        self._prompts = Prompts(checkpoint, renderer, bounds)
        self._access = access
        self._stall_s = stall_s
        self.draining = False
        self.active: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def answering(self) -> Answering:
        """How a call is named, refused and logged; SchedulerService answers alike."""
        return self._answering

    async def drained(self) -> None:
        """Returns once no generation runs."""
        await self._idle.wait()

    async def Generate(  # type: ignore[override]
        self, request: wire.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        # Writes instead of yielding: a cancelled call would leave a generator's `finally` to the collector.
        async with self._answering("Generate", request.request_id, context) as call:
            name = self._admit(call)
            try:
                async with self._turn(request):
                    await self._generate(request, context, call)
            finally:
                self.active.discard(name)
                if not self.active:
                    self._idle.set()

    async def Tokenize(
        self, request: wire.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.TokenizeResponse:
        async with self._answering("Tokenize", request.request_id, context) as call:
            ids = await self._prompts.for_tokenize(request)
            call.fields["tokens"] = len(ids)
            pieces = await _off_the_loop(len(ids), self._checkpoint.tokenizer.pieces, ids)
            return wire.TokenizeResponse(request_id=call.request_id, token_ids=ids, pieces=pieces)
        raise AssertionError("an aborted call does not return")

    async def Detokenize(
        self, request: wire.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.DetokenizeResponse:
        async with self._answering("Detokenize", request.request_id, context) as call:
            ids = to_detokenize(request, self._worker.info)
            skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")
            decode = partial(self._checkpoint.tokenizer.decode, skip_special=skip)
            text = await _off_the_loop(len(ids), decode, ids)
            return wire.DetokenizeResponse(request_id=call.request_id, text=text)
        raise AssertionError("an aborted call does not return")

    async def GetModelInfo(
        self, request: wire.GetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> wire.GetModelInfoResponse:
        async with self._answering("GetModelInfo", request.request_id, context) as call:
            stats = await self._worker.stats()
            return model_info(call.request_id, self._worker.info, stats, self._checkpoint)
        raise AssertionError("an aborted call does not return")

    def _admit(self, call: _Call) -> str:
        if self.draining:
            raise unavailable("the server is shutting down; send the request to another one")
        # Ids are a tenant's own: whether another one uses the same is none of its business.
        name = f"{tenant()}/{call.request_id}".removeprefix("/")
        if name in self.active:
            raise already_running(call.request_id)
        self.active.add(name)
        self._idle.clear()
        return name

    def _turn(self, request: wire.GenerateRequest) -> AbstractAsyncContextManager[None]:
        return self._access.turn(request.priority) if self._access is not None else nullcontext()

    async def _generate(
        self, request: wire.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any], call: _Call
    ) -> None:
        try:
            self._worker.check_room()  # before a prompt is read that nobody will look at
        except QueueFull as error:
            raise _as_call_error(error) from error
        prompt = await self._prompts.for_generate(request, self._worker.info)
        prepared = to_request(request, call.request_id, prompt, self._worker.info, self._checkpoint.sampling)
        generation = Generation(prepared, self._checkpoint.tokenizer, call.request_id, call.arrived)
        try:
            with self._telemetry.generation(request, prepared, generation, context) as seen:
                await self._stream(prepared, generation, context, seen)
        finally:
            call.fields.update(_summary(generation))

    async def _stream(
        self,
        prepared: Prepared,
        generation: Generation,
        context: grpc.aio.ServicerContext[Any, Any],
        seen: GenerationWatch,
    ) -> None:
        stream = self._worker.open(prepared.request)
        seen.opened(stream.key)
        finished = False  # whether the engine is done with it: else `finally` must free its pages
        try:
            with StallGuard(self._stall_s) as guard:
                while not generation.done:
                    arrivals = await stream.read()
                    finished = arrivals[-1].delta.finish is not None
                    for message in generation.feed(arrivals):
                        guard.begin()
                        await context.write(message)
                        guard.end()
                        seen.wrote(message)
        except (InvalidRequest, QueueFull, SlowClient, Stalled) as error:
            finished = isinstance(error, InvalidRequest | QueueFull)
            raise _as_call_error(error) from error
        finally:
            self._worker.close(stream, finished=finished)

    @asynccontextmanager
    async def _answering(
        self, method: str, request_id: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[_Call]:
        """Names the call, turns problems into statuses, and writes its one log line."""
        call = _Call(method, request_id or uuid.uuid4().hex)
        if name := tenant():
            call.fields["tenant"] = name
        status = "OK"
        level = logging.INFO
        failure: BaseException | None = None
        try:
            try:
                _check_name(call, request_id)
                context.set_trailing_metadata((("x-request-id", call.request_id),))
                yield call
            except CallError:
                raise
            except EngineFailed as error:
                raise unavailable(str(error), error.retry_after_s) from error
            except grpc.aio.InternalError as error:  # a write that failed: who left is noticed there first
                raise asyncio.CancelledError from error
            except Exception as error:
                failure, level = error, logging.ERROR
                raise internal("the server failed on this request; its log has the cause") from error
        except CallError as error:
            status = error.code.name
            call.fields["message"] = error.message
            await abort(context, error, call.request_id)
        except asyncio.CancelledError:
            status = cut_off(context, time.monotonic() - call.arrived)
            raise
        finally:
            log(
                "request",
                level=level,
                exc_info=failure or False,
                method=call.method,
                request_id=call.request_id,
                status=status,
                seconds=round(time.monotonic() - call.arrived, 6),
                **call.fields,
            )


async def _off_the_loop(size: int, function: Callable[[list[int]], _Result], ids: list[int]) -> _Result:
    """In a thread where it takes long."""
    return function(ids) if size < LONG_TEXT else await asyncio.to_thread(function, ids)


def _check_name(call: _Call, request_id: str) -> None:
    try:
        check_request_id(request_id)
    except CallError:
        call.request_id = uuid.uuid4().hex  # the client's own cannot travel in metadata
        raise


def _as_call_error(error: Exception) -> CallError:
    if isinstance(error, InvalidRequest):
        return invalid([Violation(error.field, error.message)])
    if isinstance(error, QueueFull):
        return queue_full(str(error), error.retry_after_s)
    reason = f"the client stopped reading the stream: {error}"
    return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)


def _summary(generation: Generation) -> dict[str, Any]:
    """What the log says of a generation, finished or not."""
    usage, counts, clock = generation.usage, generation.counts, generation.clock
    return {
        "finish_reason": wire.FinishReason.Name(generation.reason).removeprefix("FINISH_REASON_").lower(),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "verified": counts.verified,
        "accepted": counts.accepted,
        "mean_accepted_length": round(counts.mean_accepted_length, 4),
        "acceptance_by_position": [round(rate, 4) for rate in counts.acceptance_by_position],
        "queue_s": round(clock.queue_s, 6),
        "ttft_s": round(clock.ttft_s, 6),
        "decode_s": round(clock.decode_s, 6),
        "max_gap_s": round(clock.max_gap_s, 6),
    }
