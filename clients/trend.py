"""What decision records say over time: second by second, as plain numbers. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(slots=True)
class Second:
    """Sums over the records of one second."""

    rounds: int = 0  # by their numbers, those without a record included
    records: int = 0
    tokens: int = 0
    request_rounds: int = 0
    drafted: int = 0  # request-rounds with a draft
    verified: int = 0
    accepted: int = 0
    predicted_accepts: float = 0.0
    measured_s: float = 0.0
    predicted_s: float = 0.0
    decide_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Rounds without a record count as much as those with one."""
        return self.tokens * self.rounds / self.records if self.records else 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens a decode round of a request, the target's own included."""
        return self.tokens / self.request_rounds if self.request_rounds else 0.0

    @property
    def verify_budget(self) -> float:
        """Draft tokens verified, a decode round of a request."""
        return self.verified / self.request_rounds if self.request_rounds else 0.0

    @property
    def skip_share(self) -> float:
        return 1 - self.drafted / self.request_rounds if self.request_rounds else 0.0


class Trend:
    """Seconds, the newest last; empty ones where nothing ran.

    Args:
        length: seconds that are kept.
    """

    def __init__(self, length: int) -> None:
        self.seconds: deque[Second] = deque([Second() for _ in range(length)], maxlen=length)
        self.last: Record | None = None
        self.lost = 0
        self._now: int | None = None

    def add(self, records: Iterable[Record], now: float, lost: int = 0) -> None:
        """Take in records; those without a time of their own count for `now`."""
        self.lost += lost
        for record in records:
            ended = record.get("ended_s")
            self.tick(now if ended is None else ended)
            self._add(record)

    def tick(self, now: float) -> None:
        """Let time pass, to Unix time `now`."""
        second = int(now)
        if self._now is None:
            self._now = second
        for _ in range(min(second - self._now, len(self.seconds))):
            self.seconds.append(Second())
        self._now = max(second, self._now)

    def _add(self, record: Record) -> None:
        into = self.seconds[-1]
        before = self.last["round"] if self.last is not None else record["round"] - 1
        into.rounds += max(record["round"] - before, 1)  # a new engine begins at 1 again
        into.records += 1
        into.tokens += record["tokens"]
        into.request_rounds += len(record["requests"])
        into.drafted += sum(request["drafted"] > 0 for request in record["requests"])
        into.verified += record["verified"]
        into.accepted += record["accepted"]
        into.predicted_accepts += record["predicted_accepts"]
        into.measured_s += record["measured_s"]
        into.predicted_s += record["predicted_s"]
        into.decide_s += record["decide_s"]
        self.last = record

    def recent(self, seconds: int) -> Second:
        """The sums of the last whole seconds."""
        total = Second()
        for second in list(self.seconds)[-1 - seconds : -1]:
            for name in Second.__dataclass_fields__:
                setattr(total, name, getattr(total, name) + getattr(second, name))
        return total
