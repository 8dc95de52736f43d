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


def configure(level: str) -> None:
    """Sends every log of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log(event: str, /, *, level: int = logging.INFO, exc_info: bool | BaseException = False, **fields: Any) -> None:
    """One line. `event` names what happened; the rest are its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"fields": {**fields, **trace_fields()}}, exc_info=exc_info)
