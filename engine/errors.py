"""What can go wrong for reasons outside the engine. Each message names the culprit and the mend."""

from __future__ import annotations


class InvalidRequest(ValueError):
    """A request that can never be served. `field` is its path in the wire message."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, str]]:
        return InvalidRequest, (self.field, self.message)


class QueueFull(RuntimeError):
    """The waiting queue is at its limit; try again after `retry_after_s` seconds."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again later")
        self.waiting = waiting
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFull], tuple[int, float]]:
        return QueueFull, (self.waiting, self.retry_after_s)


class LoadError(RuntimeError):
    """A checkpoint, drafter or configuration that cannot be served; the message says what to do."""
