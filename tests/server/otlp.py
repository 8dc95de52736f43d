"""A collector in this process: takes OTLP over gRPC and keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_wire
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_wire
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass
class Collector:
    """What has been received. `hold` keeps every export waiting."""

    endpoint: str = ""
    hold: asyncio.Event | None = None
    resources: list[dict[str, Any]] = field(default_factory=list)
    spans: list[trace_pb2.Span] = field(default_factory=list)
    metrics: list[metrics_pb2.Metric] = field(default_factory=list)

    def named(self, name: str) -> list[trace_pb2.Span]:
        return [span for span in self.spans if span.name == name]

    def metric(self, name: str) -> metrics_pb2.Metric:
        """The latest."""
        return [metric for metric in self.metrics if metric.name == name][-1]

    async def wait(self) -> None:
        if self.hold is not None:
            await self.hold.wait()


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, kept: Collector) -> None:
        self._kept = kept

    async def Export(self, request: Any, context: Any) -> Any:
        await self._kept.wait()
        for part in request.resource_spans:
            self._kept.resources.append(plain(part.resource.attributes))
            for scope in part.scope_spans:
                self._kept.spans += scope.spans
        return trace_wire.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, kept: Collector) -> None:
        self._kept = kept

    async def Export(self, request: Any, context: Any) -> Any:
        await self._kept.wait()
        for part in request.resource_metrics:
            for scope in part.scope_metrics:
                self._kept.metrics += scope.metrics
        return metrics_wire.ExportMetricsServiceResponse()


@asynccontextmanager
async def collecting(address: str = "127.0.0.1:0") -> AsyncIterator[Collector]:
    kept = Collector()
    server = grpc.aio.server()
    trace_grpc.add_TraceServiceServicer_to_server(_Traces(kept), server)
    metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(kept), server)
    kept.endpoint = f"http://127.0.0.1:{server.add_insecure_port(address)}"
    await server.start()
    try:
        yield kept
    finally:
        if kept.hold is not None:
            kept.hold.set()
        await server.stop(0)


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as Python values."""
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def points(metric: metrics_pb2.Metric) -> Iterator[Any]:
    """The data points, of whatever kind."""
    yield from getattr(metric, metric.WhichOneof("data")).data_points
