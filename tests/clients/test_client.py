"""The client library against the real service around a scripted engine."""

from __future__ import annotations

import asyncio
import threading

import pytest

from clients.client import Client, ServerError
from clients.events import Chat, Delta, Finished, Message, Options, Started, to_wire
from clients.retry import NEVER
from tests.server.conftest import Launch, until

REPLY = "hello world, naïve 漢字 🙂 done"


async def test_events_come_in_order(launch: Launch) -> None:
    running = await launch(REPLY)
    async with Client(running.address) as client:
        events = [event async for event in client.generate("hi", Options(logprobs=2), request_id="mine")]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert len(deltas) == len(events) - 2
    assert "".join(delta.text for delta in deltas) == REPLY
    assert all(len(logprob.alternatives) == 2 for delta in deltas for logprob in delta.logprobs)
    # Rounds may share a delta when the connection is behind; their counts then add up.
    rounds = [delta.round for delta in deltas if delta.round is not None]
    assert all((r.drafted, r.verified, r.accepted) == (3 * r.rounds, 2 * r.rounds, 2 * r.rounds) for r in rounds[:-1])
    assert sum(r.rounds for r in rounds) == events[-1].speculation.rounds


async def test_a_completion_is_the_sum_of_its_events(launch: Launch) -> None:
    running = await launch(REPLY)
    async with Client(running.address) as client:
        completion = await client.complete("hi", Options(temperature=0))
    finished = completion.finished
    assert completion.text == REPLY
    assert (finished.reason, finished.stop_token_id) == ("stop_token", 0)
    assert finished.usage.completion_tokens == len(completion.token_ids)
    spec = finished.speculation
    assert spec.rounds * spec.mean_accepted_length == len(completion.token_ids) - 1
    assert 0 < completion.ttft_s <= completion.total_s
    assert completion.tokens_per_s == len(completion.token_ids) / completion.total_s


async def test_all_kinds_of_prompt(launch: Launch) -> None:
    running = await launch()
    async with Client(running.address) as client:
        ids = await client.tokenize("hello")
        await client.complete("hello")
        await client.complete(ids)
        chat = Chat([Message("user", "hi")], {"thinking": "hard"})
        await client.complete(chat)
        assert await client.detokenize(await client.tokenize(chat), skip_special_tokens=False) == (
            "<|start|>user\nhi<|end|>\n<|start|>assistant\n[hard]"
        )
    first, second, third = (list(request.prompt) for request in running.engine.seen)
    assert first == second == ids
    assert len(third) > len(first)


async def test_info_is_plain(launch: Launch) -> None:
    running = await launch()
    async with Client(running.address) as client:
        info = await client.info()
    assert (info["model"], info["parameters"], info["load"]["rounds"]) == ("scripted", 1234, 0)
    assert info["default_sampling"]["top_k"] == 20


async def test_closing_the_generator_cancels_the_call(launch: Launch) -> None:
    gate = threading.Semaphore(2)
    running = await launch("hello world, " * 20, eos=False, gate=gate)
    async with Client(running.address) as client:
        events = client.generate("hi", Options(max_tokens=400))
        await anext(events)
        await events.aclose()
        await until(lambda: not running.server.service.active)
        gate.release(1)
        await until(lambda: not running.engine.running)


async def test_errors_are_typed(launch: Launch) -> None:
    running = await launch(max_queue=0)
    async with Client(running.address, retry=NEVER) as client:
        with pytest.raises(ServerError) as wrong:
            await client.complete("hi", Options(temperature=-1, top_p=3), request_id="mine")
        assert [violation.field for violation in wrong.value.violations] == ["sampling.temperature", "sampling.top_p"]
        assert (wrong.value.code, wrong.value.request_id) == ("INVALID_ARGUMENT", "mine")
        with pytest.raises(ServerError) as full:
            await client.complete("hi")
        assert (full.value.code, full.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 2.5)


async def test_a_deadline_is_an_error(launch: Launch) -> None:
    running = await launch(gate=threading.Semaphore(0))
    async with Client(running.address) as client:
        with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
            await client.complete("hi", timeout_s=0.2)
    async with Client("127.0.0.1:1") as nobody:
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            await asyncio.wait_for(nobody.info(), 20)


def test_runs_join_neighbours_of_one_kind() -> None:
    delta = Delta("abcdef", (1, 2, 3, 4, 5), (1, 2, 0, 1, 2), (True, True, False, False, True), (), None)
    assert delta.runs() == [("abc", True), ("d", False), ("ef", True)]


def test_absent_options_are_absent_on_the_wire() -> None:
    message = to_wire("hi", Options(), "")
    assert not message.sampling.ListFields()
    assert not message.HasField("max_tokens")
    zero = to_wire([1, 2], Options(temperature=0, seed=0, max_tokens=0), "")
    assert zero.sampling.HasField("temperature")
    assert zero.sampling.HasField("seed")
    assert zero.HasField("max_tokens")
