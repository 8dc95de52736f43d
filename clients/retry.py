"""When a failed call is worth another try, and after how long."""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import dataclass

from clients.errors import AlreadyRunning, ResourceExhausted, ServerError, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Exponential backoff with full jitter: before try n + 1, a random wait of up to min(longest, first · 2ⁿ⁻¹) s.

    Tried again are calls that found nobody (UNAVAILABLE) or a full queue (RESOURCE_EXHAUSTED with RetryInfo), and only
    before their first message: a text that has begun is never started over. A server's RetryInfo is waited out, with
    the jitter on top, so that those it sent away do not all come back at once. No wait goes past the call's deadline.
    """

    attempts: int = 5
    first_s: float = 0.1
    longest_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts: must be at least 1, not {self.attempts}")
        if not 0 <= self.first_s <= self.longest_s:
            raise ValueError(f"first_s: must be from 0 to longest_s, not {self.first_s}")

    def wait_s(
        self, error: ServerError, attempt: int, left_s: float, earlier: ServerError | None = None
    ) -> float | None:
        """Seconds to wait after try `attempt` (from 1) failed with `error`, or None to give up.

        Args:
            left_s: time until the deadline; infinite without one.
            earlier: what the try before this one failed with.
        """
        if attempt >= self.attempts or not _worth_it(error, earlier):
            return None
        # 2^30 is beyond any `longest_s`; the exponent must not overflow.
        jitter = random.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(attempt - 1, 30)))
        wait = (error.retry_after_s or 0.0) + jitter
        return wait if wait < left_s else None


NEVER = Retry(attempts=1)


class Attempts:
    """The tries of one call, all under one deadline of `timeout_s` seconds from now."""

    def __init__(self, retry: Retry, timeout_s: float | None) -> None:
        self._retry = retry
        self._ends = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._number = 1
        self._earlier: ServerError | None = None

    @property
    def left_s(self) -> float | None:
        """Time until the deadline, as gRPC wants it; None without one."""
        return None if math.isinf(self._ends) else max(0.0, self._ends - time.monotonic())

    async def again(self, error: ServerError) -> None:
        """Waits for the next try's time.

        Raises:
            ServerError: `error`, when there is to be no next try.
        """
        error.attempts = self._number
        wait = self._retry.wait_s(error, self._number, self._ends - time.monotonic(), self._earlier)
        if wait is None:
            raise error
        await asyncio.sleep(wait)
        self._earlier = error
        self._number += 1


def _worth_it(error: ServerError, earlier: ServerError | None) -> bool:
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None
    # A lost connection leaves the name in use until the server has noticed: our own earlier try is in the way.
    if isinstance(error, AlreadyRunning):
        return isinstance(earlier, Unavailable | AlreadyRunning)
    return isinstance(error, Unavailable)
