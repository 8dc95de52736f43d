"""Hands the application's trace on to the server, where the application uses OpenTelemetry."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """`traceparent` and its like for the current span; nothing when nobody traces.

    Without a dependency: an application that traces has imported OpenTelemetry.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())
