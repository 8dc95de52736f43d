"""Two clocks: spans count nanoseconds since 1970, the server and its engine the machine's monotonic seconds."""

from __future__ import annotations

import time


def epoch_ns(monotonic_s: float) -> int:
    """A time of `time.monotonic` as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
