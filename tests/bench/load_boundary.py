"""What the engine's process does between two rounds: reading what arrived, packing and sending what came."""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

from engine.config import EngineConfig
from engine.messages import EndConditions, EngineStats, PolicySettings, Request, TokenDelta
from engine.schedule.record import History
from engine.schedule.steering import settings
from server.boundary import Submit, pack
from server.engine_loop import GATHER_S, EngineLoop, Pipe

TURNS = 300
_SPENT_S = 2e-3  # a round of the embedded model: how many travel together depends on it


class _Instant:
    """An engine whose rounds take no time, and give every request a token."""

    def __init__(self, requests: int) -> None:
        self.history = History(1)
        self._deltas = [
            TokenDelta(f"request#{n}", (7,), decode_round=True, drafted=7, verified=3) for n in range(requests)
        ]

    has_work = True

    def step(self) -> list[TokenDelta]:
        return [TokenDelta(d.request_id, d.tokens, decode_round=True, drafted=7, verified=3) for d in self._deltas]

    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def reset(self) -> None: ...
    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0)

    def policy_settings(self) -> PolicySettings:
        return settings(EngineConfig(model=""), drafts=True)

    def update_policy(self, changes: Any) -> PolicySettings:
        return self.policy_settings()


def between_s(requests: int) -> float:
    """Median seconds of a turn of the engine's loop beyond its round."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        ours.sendall(pack(Submit(Request("request", (1,), EndConditions(1)))))
        loop = EngineLoop(_Instant(requests), Pipe(theirs), gather_s=GATHER_S)
        every = max(round(GATHER_S / _SPENT_S), 1)
        spent = []
        for turn in range(TURNS):
            loop._sent = 0.0 if turn % every == 0 else time.monotonic()
            began = time.perf_counter()
            loop._turn()
            spent.append(time.perf_counter() - began)
            _drain(ours)
    groups = [sum(spent[start : start + every]) / every for start in range(every, TURNS - every, every)]
    return statistics.median(groups)


def _drain(connection: socket.socket) -> None:
    try:
        while connection.recv(2**20):
            pass
    except BlockingIOError:
        return
