"""Traces and metrics of the service, by OpenTelemetry. Off, and not even imported, unless something is configured.

What is emitted under which name stands in the README's table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from dspark.v1 import generation_pb2 as wire

if TYPE_CHECKING:
    from server.convert import Prepared
    from server.generation import Generation
    from server.worker import Worker

ENDPOINTS = tuple(f"OTEL_EXPORTER_OTLP{signal}ENDPOINT" for signal in ("_", "_TRACES_", "_METRICS_"))
EXPORTERS = ("OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER")


class GenerationWatch:
    """Sees one generation go by; this one looks away."""

    def opened(self, key: str) -> None:
        """The engine has the request, under this name."""

    def wrote(self, message: wire.GenerateResponse) -> None:
        """The client was sent something."""


_NOBODY = GenerationWatch()


class Telemetry:
    """What the service calls; this one does nothing."""

    def interceptors(self) -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
        return ()

    def watch(self, worker: Worker) -> None:
        """Hears of the engine's rounds from now on. Only once the worker has started."""

    def listening(self, host: str, port: int) -> None:
        """The address at which calls arrive."""

    @contextmanager
    def generation(
        self,
        request: wire.GenerateRequest,
        prepared: Prepared,
        generation: Generation,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Iterator[GenerationWatch]:
        """Around one generation, from its admission to its end."""
        yield _NOBODY

    async def close(self) -> None:
        """Sends what is left, for a few seconds at most."""


OFF = Telemetry()


def configured(environment: Mapping[str, str], metrics_port: int | None) -> bool:
    """Whether anybody asked for traces or metrics."""
    if metrics_port is not None:
        return True
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    wanted = any(environment.get(name, "").strip() for name in ENDPOINTS)
    return wanted or any(environment.get(name, "").strip() not in ("", "none") for name in EXPORTERS)


def from_environment(host: str, metrics_port: int | None) -> Telemetry:
    """What the standard variables (OTEL_…) and `--metrics-port` ask for.

    Args:
        host: where the Prometheus endpoint listens.

    Raises:
        LoadError: a value that cannot be followed, naming it.
    """
    if not configured(os.environ, metrics_port):
        return OFF
    from server.telemetry.setup import start  # half a second to import

    return start(os.environ, host, metrics_port)
