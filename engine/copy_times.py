"""What rounds with copies (`engine.lookup`) take beside their rows."""

from __future__ import annotations

from collections.abc import Callable

from engine.schedule.finished import FinishedRound
from engine.schedule.native_cost import PREFILL, REQUESTS, ROWS

_PLAIN_GAIN, _GAIN = 0.05, 0.1  # how fast rounds' times are followed
_EVERY = 4  # of the rounds without copies, one is looked at
_ADDED, _MOST_ADDED = 0.2, 3.0  # at first, and at most
_HOPE = 0.01  # how fast what is not tried returns to nothing


class CopyTimes:
    """What a round with copies takes beside its rows, by how many requests decode: mostly the host's own work.

    The cost table knows rows of whole blocks alone; a row or two more than fill a tile cost more than their share.
    """

    def __init__(self) -> None:
        self._unread = _EVERY  # rounds without copies since the last that was looked at
        self._plain_s: dict[int, float] = {}  # of rounds without copies, drafts and prompts
        self._added: dict[int, float] = {}  # by copies, in such rounds' times, beyond what their rows should

    def learn(self, finished: FinishedRound, row_s: Callable[[], float]) -> None:
        """Take in a round without drafts; those with prompts say nothing, and of those without copies some will do."""
        if not finished.copied:
            self._unread += 1
            if self._unread < _EVERY:
                return
        work = finished.work
        if work[PREFILL]:
            return
        self._unread = 0
        count, seconds = int(work[REQUESTS]), sum(finished.seconds)
        rows, plain_s = int(work[ROWS]) - count, self._plain_s.get(count)
        if not rows:
            if plain_s is not None:  # a stall counts as a round twice as long
                seconds = plain_s + _PLAIN_GAIN * (min(seconds, 2 * plain_s) - plain_s)
            self._plain_s[count] = seconds
        elif plain_s is not None:
            more = min(max((seconds - plain_s - rows * row_s()) / plain_s, 0.0), _MOST_ADDED)
            known = self._added.get(count, _ADDED)
            self._added[count] = known + _GAIN * (more - known)

    def fixed_price(self, count: int) -> float:
        """What the copies of a round cost beside their rows, in tokens that the time would bring otherwise."""
        return count * self._added.get(count, _ADDED)

    def dropped(self, count: int) -> None:
        """Copies were not worth their price: what is not tried would stay dear for good."""
        self._added[count] = self._added.get(count, _ADDED) * (1 - _HOPE)
