"""The engine's side of the boundary: what is said when, and how it is packed."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine.errors import InvalidRequest, QueueFull
from engine.messages import EndConditions, FinishReason, Request, TokenDelta, TokenLogprob
from server.boundary import Answer, Ask, Cancel, Frames, Round, Submit, Watch, pack
from server.engine_loop import EngineLoop, Pipe
from tests.server.fake_engine import ScriptedEngine


def request(name: str, max_tokens: int = 31) -> Request:
    return Request(name, (1, 2), EndConditions(max_tokens))


@contextmanager
def looping(engine: ScriptedEngine, gather_s: float) -> Iterator[socket.socket]:
    """Our end of the socket pair; hanging up ends the loop."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=EngineLoop(engine, Pipe(theirs), gather_s).run)
    thread.start()
    with theirs:
        with ours:
            ours.settimeout(30)
            yield ours
        thread.join(30)
    assert not thread.is_alive()


def writes(connection: socket.socket) -> Iterator[list[Any]]:
    """What came together, one list a write."""
    while True:
        head = connection.recv(4, socket.MSG_WAITALL)
        body = connection.recv(int.from_bytes(head), socket.MSG_WAITALL)
        yield Frames().feed(head + body)


def test_short_rounds_travel_together_and_ends_do_not_wait() -> None:
    with looping(ScriptedEngine([1, 2, 3], block=1), gather_s=3600.0) as connection:
        connection.sendall(pack(Submit(request("r", max_tokens=20))))
        came = writes(connection)
        first = next(came)
        assert [delta.cached_tokens for delta in first[0].deltas] == [2, None]
        rest = next(came)
        assert len(rest) == 19
        assert rest[-1].deltas[0].finish is FinishReason.LENGTH


def test_long_rounds_travel_alone() -> None:
    with looping(ScriptedEngine([1, 2, 3], block=1), gather_s=0.0) as connection:
        connection.sendall(pack(Submit(request("r", max_tokens=20))))
        came = writes(connection)
        assert [len(next(came)) for _ in range(20)] == [1] * 20


def test_a_newcomer_does_not_hold_back_what_the_others_have() -> None:
    gate = threading.Semaphore(3)
    engine = ScriptedEngine([1], gate=gate)
    with looping(engine, gather_s=3600.0) as connection:
        connection.sendall(pack(Submit(request("old"))))
        came = writes(connection)
        next(came)
        while engine.rounds < 3:
            time.sleep(0.001)
        time.sleep(0.02)  # until it waits for the gate again
        connection.sendall(pack(Submit(request("new"))))
        gate.release(1)  # ends the round under way; the next one does not end
        assert [delta.request_id for round_ in next(came) for delta in round_.deltas] == ["old"] * 3
        gate.release(1000)
        list(zip(range(2), came, strict=False))


def test_answers_and_refusals_come_at_once() -> None:
    with looping(ScriptedEngine([1], max_queue=0), gather_s=3600.0) as connection:
        came = writes(connection)
        connection.sendall(pack(Ask(7, "stats")))
        (answer,) = next(came)
        assert isinstance(answer, Answer) and (answer.number, answer.value.pages_total) == (7, 64)
        connection.sendall(pack(Submit(request("r")), Cancel("nobody")))
        (round_,) = next(came)
        ((key, error),) = round_.refused
        assert (key, type(error), error.retry_after_s) == ("r", QueueFull, 2.5)


def test_a_bug_in_a_submission_is_told_without_its_details() -> None:
    class Buggy(ScriptedEngine):
        def submit(self, request: Request) -> None:
            raise KeyError("a secret")

    with looping(Buggy([1]), gather_s=0.0) as connection:
        connection.sendall(pack(Submit(request("r"))))
        ((key, error),) = next(writes(connection))[0].refused
        assert (key, type(error)) == ("r", RuntimeError)
        assert "secret" not in str(error)


@pytest.mark.parametrize("error", [InvalidRequest("top_p", "must be above 0"), QueueFull(3, 1.5)])
def test_errors_cross_whole(error: Exception) -> None:
    (again,) = Frames().feed(pack(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_messages_survive_any_cut_of_the_stream() -> None:
    generator = random.Random(2)
    logprobs = (TokenLogprob(9, -0.25, ((9, -0.25), (8, -2.0))),)
    delta = TokenDelta("r#1", (9, 8), logprobs, FinishReason.STOP_ID, "", True, 7, 5, 1, None)
    messages: list[Any] = [Round(1.0, 2.0, [delta] * count, []) for count in range(40)]
    stream = b"".join(pack(*messages[start : start + 3]) for start in range(0, 40, 3))
    frames, out, place = Frames(), [], 0
    while place < len(stream):
        size = generator.choice([1, 3, 100, 5000])
        out += frames.feed(stream[place : place + size])
        place += size
    assert out == messages


def test_records_cross_only_while_they_are_asked_for() -> None:
    with looping(ScriptedEngine([1, 2, 3], block=1), gather_s=3600.0) as connection:
        came = writes(connection)

        def records(max_tokens: int) -> list[int]:
            connection.sendall(pack(Submit(request(f"r{max_tokens}", max_tokens))))
            return [record["round"] for round_ in [*next(came), *next(came)] for record in round_.records]

        assert records(20) == []
        connection.sendall(pack(Watch(3)))
        assert records(21) == [21, 24, 27, 30, 33, 36, 39]
        connection.sendall(pack(Watch(0)))
        assert records(22) == []


def test_a_question_that_makes_no_sense_is_answered_with_an_error() -> None:
    with looping(ScriptedEngine([1]), gather_s=3600.0) as connection:
        came = writes(connection)
        connection.sendall(pack(Ask(1, "update_policy", ({"policy": "clever"},))))
        connection.sendall(pack(Ask(2, "update_policy", ({"policy": "fixed", "draft_tokens": 2},))))
        answers = [*next(came)]
        answers += next(came) if len(answers) == 1 else []
    assert (answers[0].number, answers[0].error.field, answers[1].error) == (1, "policy", None)
    assert (answers[1].value.policy, answers[1].value.draft_tokens) == ("fixed", 2)
