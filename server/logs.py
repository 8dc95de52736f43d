"""Structured logs: one JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("dspark.server")
trace_fields: Callable[[], Mapping[str, str]] = (
    dict  # names the trace that a line belongs to; set where calls are traced
)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _WithoutTraceback(logging.Filter):
    """gRPC logs rubbish in headers as an exception of its own: whoever sends it could fill the log with those."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.getMessage().startswith("Invalid encoding"):
            record.levelno, record.levelname = logging.WARNING, "WARNING"
            record.exc_info = None
        return True


_WITHOUT_TRACEBACK = _WithoutTraceback()


def configure(level: str) -> None:
    """Sends every log of this process to stderr as JSON lines."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_WITHOUT_TRACEBACK)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log(event: str, /, *, level: int = logging.INFO, exc_info: bool | BaseException = False, **fields: Any) -> None:
    """One line. `event` names what happened; the rest are its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"fields": {**fields, **trace_fields()}}, exc_info=exc_info)
