"""`dspark.v1.SchedulerService`: shows what the scheduler decides, and changes how. Apart from generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import grpc
from dspark.v1 import scheduler_pb2 as wire
from dspark.v1 import scheduler_pb2_grpc as wire_grpc

from engine.errors import InvalidRequest
from engine.schedule.steering import policies, settings
from server import steering
from server.problems import Violation, invalid, unavailable
from server.rounds import Record, Watcher
from server.service import Answering
from server.worker import Worker

SERVICE_NAME: str = wire.DESCRIPTOR.services_by_name["SchedulerService"].full_name
Context = grpc.aio.ServicerContext[Any, Any]


class SchedulerService(wire_grpc.SchedulerServiceServicer):
    """The handlers.

    Args:
        answering: names a call, turns problems into statuses and logs it; GenerationService's.
    """

    def __init__(self, worker: Worker, answering: Answering) -> None:
        self._worker = worker
        self._answering = answering

    async def WatchRounds(self, request: wire.WatchRoundsRequest, context: Context) -> None:  # type: ignore[override]
        async with self._answering("WatchRounds", request.request_id, context) as call:
            every, buffer = steering.to_watch(request)
            sent = dropped = 0
            try:
                async with self._watching(every, buffer) as watcher:
                    async for records, lost in self._records(watcher, every, request.history):
                        message = wire.WatchRoundsResponse(request_id=call.request_id, lost=lost)
                        message.records.extend(
                            steering.round_record(record, summary=request.summaries) for record in records
                        )
                        sent, dropped = sent + len(records), dropped + lost
                        await context.write(message)
                raise unavailable("the server is shutting down")
            finally:
                call.fields.update(records=sent, lost=dropped)

    async def GetPolicy(self, request: wire.GetPolicyRequest, context: Context) -> wire.GetPolicyResponse:
        async with self._answering("GetPolicy", request.request_id, context) as call:
            drafts = self._worker.info.block_size > 0
            return wire.GetPolicyResponse(
                request_id=call.request_id,
                policy=steering.policy(await self._worker.policy()),
                initial=steering.policy(settings(self._worker.config, drafts=drafts)),
                names=policies(drafts=drafts),
            )
        raise AssertionError("an aborted call does not return")

    async def UpdatePolicy(self, request: wire.UpdatePolicyRequest, context: Context) -> wire.UpdatePolicyResponse:
        async with self._answering("UpdatePolicy", request.request_id, context) as call:
            changes = steering.to_changes(request, self._worker.config, self._worker.info.block_size)
            try:
                now = await self._worker.update_policy(changes)
            except InvalidRequest as error:
                raise invalid([Violation(f"policy.{error.field}", error.message)]) from error
            call.fields.update(changed=changes, policy=asdict(now))
            return wire.UpdatePolicyResponse(request_id=call.request_id, policy=steering.policy(now))
        raise AssertionError("an aborted call does not return")

    @asynccontextmanager
    async def _watching(self, every: int, buffer: int) -> AsyncIterator[Watcher]:
        watcher = self._worker.rounds.open(every, buffer)
        try:
            yield watcher
        finally:
            self._worker.rounds.leave(watcher)

    async def _records(self, watcher: Watcher, every: int, history: int) -> AsyncIterator[tuple[list[Record], int]]:
        """Past rounds, then the watched ones, each once."""
        seen = 0
        if history:
            past = await self._worker.last_rounds(steering.MOST_HISTORY)
            past = [record for record in past if record["round"] % every == 0][-history:]
            if past:
                seen = past[-1]["round"]
                yield past, 0
        # The engine answers in order: what it sent before the past belongs to the past.
        while True:
            records, lost = await watcher.read()
            if not records:
                return
            fresh = [record for record in records if record["round"] > seen]
            if len(fresh) == len(records):
                seen = 0  # from here on numbers may begin again, with another engine
            if fresh or lost:
                yield fresh, lost
            await asyncio.sleep(0)
