"""The engine's side of the boundary: reads what arrived, runs a round, says what happened. One thread, blocking."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any, Protocol

from engine.errors import InvalidRequest, QueueFull
from engine.messages import EngineStats, Request, TokenDelta
from server.boundary import Answer, Ask, Cancel, Frames, Round, Submit, pack
from server.logs import log

MAX_FAILURES = 3  # rounds that fail one after the other before the engine counts as broken
_CHUNK = 2**18


class EngineLike(Protocol):
    """What is used of `engine.Engine` here."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[TokenDelta]: ...
    def reset(self) -> None: ...
    def stats(self) -> EngineStats: ...


class Pipe:
    """The engine's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = Frames()

    def send(self, *messages: Any) -> None:
        """One write for all. OSError when the server is gone."""
        self._connection.sendall(b"".join(map(pack, messages)))

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
    """Runs an engine for the server at the other end of `pipe`."""

    def __init__(self, engine: EngineLike, pipe: Pipe) -> None:
        self._engine = engine
        self._pipe = pipe
        self._questions = {"stats": engine.stats}
        self._failed_rounds = 0  # one after the other

    def run(self) -> bool:
        """Until the server hangs up: True. False when the engine keeps failing."""
        try:
            while self._failed_rounds < MAX_FAILURES:
                self._turn()
        except (EOFError, ConnectionError):
            return True
        return False

    def _turn(self) -> None:
        """Reads what arrived, runs a round if there is work, and says all that happened in one write."""
        refused: list[tuple[str, Exception]] = []
        answers: list[Answer] = []
        for message in self._pipe.receive(wait=not self._engine.has_work):
            if isinstance(message, Submit):
                self._submit(message.request, refused)
            elif isinstance(message, Cancel):
                self._engine.cancel(message.key)
            elif isinstance(message, Ask):
                answers.append(Answer(message.number, self._questions[message.method]()))
        began = time.monotonic()
        deltas: list[TokenDelta] = []
        failed = False
        if works := self._engine.has_work:
            try:
                deltas = self._engine.step()
                self._failed_rounds = 0
            except Exception as error:
                self._failed_rounds += 1
                log("round_failed", level=logging.ERROR, exc_info=error, in_a_row=self._failed_rounds)
                self._engine.reset()
                failed = True
        if works or refused or answers:
            self._pipe.send(*answers, Round(began, time.monotonic(), deltas, refused, failed))

    def _submit(self, request: Request, refused: list[tuple[str, Exception]]) -> None:
        try:
            self._engine.submit(request)
        except (InvalidRequest, QueueFull) as error:
            refused.append((request.request_id, error))
        except Exception as error:  # our mistake, not the client's
            log("submission_failed", level=logging.ERROR, exc_info=error, request_id=request.request_id)
            refused.append((request.request_id, RuntimeError("the engine failed on this submission")))
