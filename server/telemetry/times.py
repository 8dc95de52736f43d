"""Two clocks: spans count nanoseconds since 1970, the server and its engine the machine's monotonic seconds."""

from __future__ import annotations

import time

_TRIES, _CLOSE_NS = 5, 20_000


def epoch_ns(monotonic_s: float) -> int:
    """A time of `time.monotonic` as nanoseconds since 1970."""
    for _ in range(_TRIES):  # something else may run between the looks at the two clocks
        before = time.monotonic_ns()
        now = time.time_ns()
        if time.monotonic_ns() - before < _CLOSE_NS:
            break
    return now - before + int(monotonic_s * 1e9)
