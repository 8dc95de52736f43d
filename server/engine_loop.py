"""The engine's side of the boundary: reads what arrived, runs a round, says what happened. One thread, blocking."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from engine.errors import InvalidRequest, QueueFull
from engine.messages import EngineStats, PolicySettings, Request, TokenDelta
from engine.schedule.record import History, Unread
from server.boundary import Answer, Ask, Cancel, Frames, Round, Sample, Submit, Totals, Watch, pack
from server.logs import log
from server.round_samples import Samples

MAX_FAILURES = 3  # rounds that fail one after the other before the engine counts as broken
# Rounds of a small model follow each other faster than anybody reads. Waking the server, its threads and the client
# for each would cost the processor a good part of a round.
GATHER_S = 0.005
_CHUNK = 2**18


class EngineLike(Protocol):
    """What is used of `engine.Engine` here."""

    history: History

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[TokenDelta]: ...
    def reset(self) -> None: ...
    def stats(self) -> EngineStats: ...
    def policy_settings(self) -> PolicySettings: ...
    def update_policy(self, changes: Mapping[str, Any]) -> PolicySettings: ...


class Pipe:
    """The engine's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = Frames()

    def send(self, *messages: Any) -> None:
        """One write for all. OSError when the server is gone."""
        self._connection.sendall(pack(*messages))

    def receive(self, *, wait: bool) -> list[Any]:
        """What has arrived; `wait` for at least one message.

        Raises:
            EOFError: the server is gone, or is done with this engine.
        """
        messages: list[Any] = []
        while True:
            try:
                data = self._connection.recv(_CHUNK, 0 if wait and not messages else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            if not data:
                raise EOFError
            messages += self._frames.feed(data)
            if len(data) < _CHUNK and messages:
                return messages


class EngineLoop:
    """Runs an engine for the server at the other end of `pipe`.

    Args:
        gather_s: rounds that end within this time of the last write wait for company, at most until one is beyond it.
    """

    def __init__(self, engine: EngineLike, pipe: Pipe, gather_s: float = GATHER_S) -> None:
        self._engine = engine
        self._pipe = pipe
        self._gather_s = gather_s
        self._questions: dict[str, Callable[..., Any]] = {
            "stats": engine.stats,
            "policy_settings": engine.policy_settings,
            "update_policy": engine.update_policy,
            "last_rounds": self._last_rounds,
        }
        self._every = 0  # which rounds' records the server wants
        self._records: list[dict[str, Any]] = []
        self._samples = Samples(engine)
        self._failed_rounds = 0  # one after the other
        self._outbox: list[Round | Answer | Totals] = []
        self._sent = 0.0  # when the server last heard of the engine

    def run(self) -> bool:
        """Until the server hangs up: True. False when the engine keeps failing."""
        try:
            while self._failed_rounds < MAX_FAILURES:
                self._turn()
        except (EOFError, ConnectionError):
            return True
        return False

    def _turn(self) -> None:
        """Reads what arrived, runs a round if there is work, and says what happened: at once, or soon."""
        refused: list[tuple[str, Exception]] = []
        answers: list[Answer] = []
        arrived = self._pipe.receive(wait=not self._engine.has_work)
        if arrived:
            self._send(time.monotonic())  # what arrived may make this round a long one
        for message in arrived:
            if isinstance(message, Submit):
                self._submit(message.request, refused)
            elif isinstance(message, Cancel):
                self._engine.cancel(message.key)
            elif isinstance(message, Ask):
                answers.append(self._answer(message))
            elif isinstance(message, Watch):
                self._every = message.every
                self._follow()
            elif isinstance(message, Sample):
                self._samples.want(message)
                self._follow()
        began = time.monotonic()
        deltas: list[TokenDelta] = []
        failed = False
        if works := self._engine.has_work:
            deltas, failed = self._step()
        ended = time.monotonic()
        self._outbox += answers
        if works or refused:
            records, samples = tuple(self._records), self._samples.records()
            self._outbox.append(Round(began, ended, deltas, refused, failed, records, samples))
            self._records.clear()
        if (totals := self._samples.totals(ended, idle=not self._engine.has_work)) is not None:
            self._outbox.append(totals)
        # A first token is waited for, and so is a last one.
        urgent = answers or refused or failed or any(not d.decode_round or d.finish is not None for d in deltas)
        if urgent or not self._engine.has_work or ended - self._sent >= self._gather_s:
            self._send(ended)

    def _step(self) -> tuple[list[TokenDelta], bool]:
        """A round, and whether it failed."""
        try:
            deltas = self._engine.step()
            self._failed_rounds = 0
            return deltas, False
        except Exception as error:
            self._failed_rounds += 1
            log("round_failed", level=logging.ERROR, exc_info=error, in_a_row=self._failed_rounds)
            self._engine.reset()
            return [], True

    def _answer(self, question: Ask) -> Answer:
        try:
            return Answer(question.number, self._questions[question.method](*question.arguments))
        except InvalidRequest as error:
            return Answer(question.number, None, error)

    def _last_rounds(self, count: int) -> list[dict[str, Any]]:
        return [record.as_dict() for record in self._engine.history.last(count)]

    def _follow(self) -> None:
        """Looks at rounds only while somebody wants to hear of them."""
        wanted = self._every or self._samples.wanted
        self._engine.history.observer = self._observe if wanted else None

    def _observe(self, finished: Unread) -> None:
        if self._every and (record := finished.record()).round % self._every == 0:
            self._records.append({**record.as_dict(), "ended_s": time.time()})
        self._samples.see(finished)

    def _send(self, now: float) -> None:
        if self._outbox:
            self._pipe.send(*self._outbox)
            self._outbox.clear()
            self._sent = now

    def _submit(self, request: Request, refused: list[tuple[str, Exception]]) -> None:
        try:
            self._engine.submit(request)
        except (InvalidRequest, QueueFull) as error:
            refused.append((request.request_id, error))
        except Exception as error:  # our mistake, not the client's
            log("submission_failed", level=logging.ERROR, exc_info=error, request_id=request.request_id)
            refused.append((request.request_id, RuntimeError("the engine failed on this submission")))
