"""Why a round was as it was: plain values, ready to cross to another process or into a file.

Imports nothing heavy, so that whoever only shows records needs neither PyTorch nor an engine.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple, Protocol


class Stop(enum.Enum):
    """Why a round verified no more than it did."""

    NOBODY = "nobody drafted"
    EVERYTHING = "every candidate was taken"
    NO_GAIN = "the next candidate would not pay"
    BUDGET = "the budget is spent"
    RULE = "a fixed length or a threshold"


class Sitting(enum.Enum):
    """Why a request drafted, or did not."""

    DRAFTS = "drafting pays"
    ASKED = "the request or the policy says so"
    PROBE = "a probe: it may pay by now"
    NO_GAIN = "drafting would not pay"
    OFF = "the request or the policy forbids it"
    NO_ROOM = "no token, page or row is left for a draft"
    CHECK = "a check: what a round without drafts takes by now"
    LOOKUP = "its last tokens stood in it before: what followed them is copied"


# Tuples: with metrics on, both are made anew in every round, and a frozen dataclass takes twice as long to make.
class RequestRecord(NamedTuple):
    """One decoding request in one round."""

    request_id: str
    sitting: Sitting
    weight: float
    context: int  # cached tokens
    drafted: int  # tokens proposed, by the drafter or by lookup
    verified: int  # ℓ
    accepted: int
    survival: tuple[float, ...]  # corrected, of every candidate position; () without a draft


class RoundRecord(NamedTuple):
    """One round: what could have been verified, what was, what was expected and what came. Seconds throughout."""

    round: int
    policy: str
    running: int
    waiting: int
    prefill_rows: int
    candidates: int  # drafted tokens that might have been verified
    verified: int
    predicted_accepts: float
    accepted: int
    tokens: int  # committed by decoding requests
    predicted_s: float
    measured_s: float
    draft_s: float
    verify_s: float
    absorb_s: float
    decide_s: float  # of verify_s: who drafts, how much is verified, and what the round taught; pages and prompts apart
    price: float  # weighted tokens that a second was worth when lengths were chosen
    stop: Stop
    requests: tuple[RequestRecord, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        requests = [{**each._asdict(), "sitting": each.sitting.name.lower()} for each in self.requests]
        return {**self._asdict(), "stop": self.stop.name.lower(), "requests": tuple(requests)}

    def record(self) -> RoundRecord:
        """Itself: a record that is made already stands in a History like one that is not."""
        return self


class Unread(Protocol):
    """A finished round whose record is made when somebody asks for it."""

    def record(self) -> RoundRecord: ...


Observer = Callable[[Unread], None]


class History:
    """The last rounds, and somebody who may want to hear of each. Records are made for those who ask.

    Args:
        size: records kept; the oldest leave first.
        observer: hears of every round.
    """

    def __init__(self, size: int, observer: Observer | None = None) -> None:
        self._rounds: deque[Unread] = deque(maxlen=size)
        self.observer = observer

    def add(self, finished: Unread) -> None:
        self._rounds.append(finished)
        if self.observer is not None:
            self.observer(finished)

    def last(self, count: int | None = None) -> list[RoundRecord]:
        """Oldest first."""
        first = 0 if count is None else max(len(self._rounds) - count, 0)
        return [finished.record() for finished in islice(self._rounds, first, None)]
