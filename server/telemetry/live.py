"""Telemetry that is on: hands calls, generations and rounds to spans and metrics, and lets go of all in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from dspark.v1 import generation_pb2 as wire
from opentelemetry import trace
from opentelemetry.metrics import Meter

from server import logs
from server.convert import Prepared
from server.generation import Generation
from server.logs import log
from server.telemetry import GenerationWatch, Telemetry
from server.telemetry.generation import GenerationSpan
from server.telemetry.instruments import Instruments
from server.telemetry.interceptor import CallTracing
from server.telemetry.round_metrics import RoundMetrics
from server.telemetry.rounds import RoundSpans, rounds_asked
from server.worker import Worker

CLOSING_S = 5.0  # for what is left to send; a collector that is down must not hold the server's end
TOTALS_S = 1.0  # between two messages with what rounds came to


class LiveTelemetry(Telemetry):
    """Spans and metrics by one tracer and one meter.

    Args:
        round_metrics: None without metrics.
        flush: sends what is left; may block.
        abandon: makes `flush` give up; must not block.
        content: whether prompts and texts may be recorded.
        excluded: services whose calls leave no trace.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        meter: Meter,
        round_metrics: RoundMetrics | None,
        *,
        flush: Callable[[], None],
        abandon: Callable[[], None],
        content: bool = False,
        excluded: Collection[str] = (),
    ) -> None:
        self._tracer = tracer
        self._round_metrics = round_metrics
        self._flush = flush
        self._abandon = abandon
        self._content = content
        self._instruments = Instruments(meter)
        self._calls = CallTracing(tracer, self._instruments, excluded)
        self._worker: Worker | None = None
        self._rounds: RoundSpans | None = None
        self._end_totals: Callable[[], None] = lambda: None
        logs.trace_fields = _trace_fields

    def interceptors(self) -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
        return (self._calls,)

    def watch(self, worker: Worker) -> None:
        self._worker = worker
        self._instruments.serve(worker.info.model)
        if self._round_metrics is None:
            self._rounds = RoundSpans(self._tracer, worker.samples)
        else:
            self._rounds = RoundSpans(self._tracer, worker.samples, self._round_metrics.exemplify)
            self._end_totals = worker.samples.totals(self._round_metrics.take, TOTALS_S)

    def listening(self, host: str, port: int) -> None:
        self._instruments.listen(host, port)

    @contextmanager
    def generation(
        self,
        request: wire.GenerateRequest,
        prepared: Prepared,
        generation: Generation,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Iterator[GenerationWatch]:
        assert self._worker is not None and self._rounds is not None, "watch() comes first"
        seen = GenerationSpan(
            self._tracer,
            self._instruments,
            self._worker.info.model,
            self._worker.policy_name,
            request,
            prepared,
            generation,
            content=self._content,
        )
        if seen.span.is_recording():
            seen.served = self._rounds.serve(seen.span, rounds_asked(context))
        error: BaseException | None = None
        with trace.use_span(seen.span, record_exception=False, set_status_on_exception=False):
            try:
                yield seen
            except BaseException as raised:
                error = raised
                raise
            finally:
                if seen.served is not None:
                    self._rounds.leave(seen.served)
                seen.finish(error, context)

    async def close(self) -> None:
        self._end_totals()
        logs.trace_fields = dict
        loop = asyncio.get_running_loop()
        finished = asyncio.Event()

        def flush() -> None:
            try:
                self._flush()
            finally:
                with contextlib.suppress(RuntimeError):  # too late: the loop is closed
                    loop.call_soon_threadsafe(finished.set)

        # No thread of a pool: those are waited for, however long they take.
        threading.Thread(target=flush, name="telemetry-close", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSING_S):
                await finished.wait()
        except TimeoutError:
            log("telemetry_lost", level=logging.WARNING, reason=f"not sent within {CLOSING_S:g} s")
            self._abandon()


def _trace_fields() -> Mapping[str, str]:
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
