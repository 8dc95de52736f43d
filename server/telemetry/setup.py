"""From the standard variables to providers, exporters and a Prometheus endpoint. Nothing global is touched."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, start_http_server

from engine.errors import LoadError
from server.logs import log
from server.telemetry.live import LiveTelemetry
from server.telemetry.round_metrics import SCOPE, ReaderSums, RoundMetrics
from server.telemetry.rounds import RoundSampler

CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
CONTENT_ON = ("true", "span_only", "span_and_event")
EXCLUDED = "OTEL_PYTHON_GRPC_EXCLUDED_SERVICES"
TEMPORALITY = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
PROMETHEUS_PORT = 9464


class _OtlpReader(PeriodicExportingMetricReader):
    """Adds the rounds to what goes out."""

    rounds: tuple[RoundMetrics, ReaderSums] | None = None

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        super()._receive_metrics(_with_rounds(metrics_data, self.rounds), timeout_millis, **kwargs)


class _PrometheusReader(PrometheusMetricReader):
    """Adds the rounds to what is scraped."""

    rounds: tuple[RoundMetrics, ReaderSums] | None = None

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        super()._receive_metrics(_with_rounds(metrics_data, self.rounds), timeout_millis, **kwargs)


def _with_rounds(collected: MetricsData, rounds: tuple[RoundMetrics, ReaderSums] | None) -> MetricsData:
    return collected if rounds is None else rounds[0].join(collected, rounds[1])


class _Parts:
    """What has been started, and how it ends."""

    def __init__(self) -> None:
        self.closing: list[Any] = []  # called in turn; each may block
        self.abandoning: list[Any] = []  # called so that those above return

    def flush(self) -> None:
        for close in self.closing:
            close()

    def abandon(self) -> None:
        for give_up in self.abandoning:
            give_up()


def start(environment: Mapping[str, str], host: str, metrics_port: int | None) -> LiveTelemetry:
    """Telemetry as the variables and the port ask for it.

    Args:
        host: where the Prometheus endpoint listens.

    Raises:
        LoadError: a value that cannot be followed, naming it.
    """
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled:
        raise LoadError("--metrics-port: OTEL_SDK_DISABLED=true switches metrics off; unset one of the two")
    resource = _resource(environment)
    parts = _Parts()
    tracer = _tracer(environment, resource, parts)
    readers: list[_OtlpReader | _PrometheusReader] = []
    sends = _exporter(environment, "METRICS")
    try:
        if sends == "otlp":
            exporter = OTLPMetricExporter()
            parts.abandoning.append(exporter.shutdown)
            readers.append(_OtlpReader(exporter))
    except (ValueError, RuntimeError) as error:
        raise LoadError(f"OTEL_EXPORTER_OTLP_…: {error}") from error
    if metrics_port is None and sends == "prometheus":
        host = environment.get("OTEL_EXPORTER_PROMETHEUS_HOST", "localhost")
        metrics_port = int(_number(environment, "OTEL_EXPORTER_PROMETHEUS_PORT", PROMETHEUS_PORT))
    if metrics_port is not None:
        readers.append(_prometheus(host, metrics_port, parts))
    meter, rounds = _meter(environment, resource, readers, parts)
    names = (name.strip() for name in environment.get(EXCLUDED, "").split(","))
    return LiveTelemetry(
        tracer,
        meter,
        rounds,
        flush=parts.flush,
        abandon=parts.abandon,
        content=environment.get(CONTENT, "").strip().lower() in CONTENT_ON,
        excluded=tuple(filter(None, names)),
    )


def _tracer(environment: Mapping[str, str], resource: Resource, parts: _Parts) -> trace.Tracer:
    if _exporter(environment, "TRACES") != "otlp":
        return trace.NoOpTracerProvider().get_tracer(SCOPE)
    if environment.get("OTEL_TRACES_SAMPLER", "").strip().endswith("traceidratio"):
        _number(environment, "OTEL_TRACES_SAMPLER_ARG", 1.0)
    try:
        exporter = OTLPSpanExporter()
        processor = BatchSpanProcessor(exporter)
    except (ValueError, RuntimeError) as error:
        raise LoadError(f"OTEL_EXPORTER_OTLP_… or OTEL_BSP_…: {error}") from error
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.sampler = RoundSampler(provider.sampler)
    provider.add_span_processor(processor)
    parts.closing.append(provider.shutdown)
    parts.abandoning.append(exporter.shutdown)
    return provider.get_tracer(SCOPE)


def _meter(
    environment: Mapping[str, str],
    resource: Resource,
    readers: list[_OtlpReader | _PrometheusReader],
    parts: _Parts,
) -> tuple[metrics.Meter, RoundMetrics | None]:
    if not readers:
        return metrics.NoOpMeterProvider().get_meter(SCOPE), None
    attached: list[MetricReader] = list(readers)
    provider = MeterProvider(attached, resource, shutdown_on_exit=False)
    meter = provider.get_meter(SCOPE)
    rounds = RoundMetrics(meter)
    delta = environment.get(TEMPORALITY, "").strip().lower() in ("delta", "lowmemory")
    for reader in readers:
        reader.rounds = (rounds, rounds.reader(delta=delta and isinstance(reader, _OtlpReader)))
    parts.closing.insert(0, provider.shutdown)
    return meter, rounds


def _prometheus(host: str, port: int, parts: _Parts) -> _PrometheusReader:
    registry = CollectorRegistry()
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise LoadError(f"--metrics-port {port}: cannot listen on {host}: {error}; choose another port") from error
    log("metrics", url=f"http://{host}:{server.server_port}/metrics")
    parts.closing.append(server.shutdown)
    return _PrometheusReader(scope_info_enabled=False, registry=registry)


def _exporter(environment: Mapping[str, str], signal: str) -> str:
    """otlp, prometheus or none."""
    name = f"OTEL_{signal}_EXPORTER"
    chosen = environment.get(name, "").strip().lower()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if not chosen:
        chosen = "otlp" if any(environment.get(endpoint, "").strip() for endpoint in endpoints) else "none"
    allowed = ("otlp", "none", "prometheus") if signal == "METRICS" else ("otlp", "none")
    if chosen not in allowed:
        raise LoadError(f"{name}: {chosen!r} is not one of {', '.join(allowed)}")
    if chosen == "otlp":
        for variable in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if protocol := environment.get(variable, "").strip():
                if protocol != "grpc":
                    raise LoadError(f"{variable}: {protocol!r} is not spoken here; use grpc (port 4317)")
                break
    return chosen


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(environment.get(name, "").strip() or default)
    except ValueError:
        raise LoadError(f"{name}: {environment[name]!r} is not a number") from None


def _resource(environment: Mapping[str, str]) -> Resource:
    """What the variables say of the service, and a name and an instance where they say nothing."""
    given = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    ours = {}
    if not environment.get("OTEL_SERVICE_NAME") and f"{SERVICE_NAME}=" not in given:
        ours[SERVICE_NAME] = "dspark"
    if f"{SERVICE_INSTANCE_ID}=" not in given:
        ours[SERVICE_INSTANCE_ID] = str(uuid.uuid4())
    return Resource.create(ours)
