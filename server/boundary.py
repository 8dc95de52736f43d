"""What crosses between the server and its engine's process, and how: lists of messages, pickled, after their length.

Pickle never reads what came over a network: only the two ends of a socket pair that the server made itself.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, NamedTuple

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.messages import EngineInfo, EngineStats, Request, TokenDelta
from engine.schedule.record import RoundRecord
from server.round_totals import RoundTotals

_LENGTH = struct.Struct("!I")


class Start(NamedTuple):
    """The first message to the engine's process."""

    config: EngineConfig
    log_level: str


class Submit(NamedTuple):
    request: Request


class Cancel(NamedTuple):
    key: str


class Ask(NamedTuple):
    """A method of the engine to call between two rounds; `number` ties the answer to the question."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


class Watch(NamedTuple):
    """Send the decision records of rounds whose number is a multiple of `every`; 0: of none, as at the start."""

    every: int


class Sample(NamedTuple):
    """What traces and metrics want to hear of rounds from now on, in place of what they wanted before."""

    records_s: float | None = None  # at least so many seconds between two records, 0: every round's; None: none
    totals_s: float | None = None  # about so many seconds between two Totals; None: none


class Ready(NamedTuple):
    """Loaded and warm."""

    info: EngineInfo
    config: EngineConfig  # with everything filled in that Start left to the machine


class NotLoaded(NamedTuple):
    """There is nothing that could be served; `message` says what to do."""

    message: str


class Round(NamedTuple):
    """What a turn of the engine did for everybody. Also a sign of life: one is sent even when nothing happened."""

    began: float  # time.monotonic, one clock for all processes of a machine
    ended: float
    deltas: list[TokenDelta]
    refused: list[tuple[str, Exception]]  # submissions, by key
    failed: bool = False  # the round raised, and every request is gone
    records: tuple[dict[str, Any], ...] = ()  # RoundRecord.as_dict, and `ended_s` (Unix time); only while watched
    samples: tuple[RoundRecord, ...] = ()  # as far as `Sample` asks for them


class Totals(NamedTuple):
    """What all rounds since the last message of this kind came to, and how busy the engine is now."""

    rounds: RoundTotals
    stats: EngineStats


class Answer(NamedTuple):
    number: int
    value: Any
    error: InvalidRequest | None = None  # the question makes no sense to the engine


def pack(*messages: Any) -> bytes:
    """Messages as they travel, together."""
    body = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages again."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Any]:
        """The messages that `data` completes, in order."""
        if self._rest:
            data = self._rest + data
        messages: list[Any] = []
        start = 0
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            end = start + _LENGTH.size + length
            if end > len(data):
                break
            messages.extend(pickle.loads(memoryview(data)[start + _LENGTH.size : end]))
            start = end
        self._rest = data[start:]
        return messages
