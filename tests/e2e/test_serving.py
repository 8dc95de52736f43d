"""The embedded model behind a real socket: what a user sees."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from clients.client import Client, Completion, ServerError
from clients.events import Chat, Message, Options
from tests.e2e.conftest import Process, client, generate

CODE = "def read_lines(path):\n    with open(path) as file:"


def test_one_line_says_that_it_serves(server: Process) -> None:
    words = server.ready_line.split()
    assert (len(words), words[0], words[2]) == (4, "serving", "on")


def test_the_command_line_prints_the_contracts_object(server: Process) -> None:
    answer = generate(server.address, CODE, "--max-tokens", "24", "--temperature", "0")
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "speculation", "timing"}
    spec, usage = answer["speculation"], answer["usage"]
    assert usage["completion_tokens"] == len(answer["token_ids"])
    assert spec["rounds"] * spec["mean_accepted_length"] == pytest.approx(usage["completion_tokens"] - 1)
    assert spec["accepted"] == sum(spec["accepted_by_position"])
    assert spec["verified"] == sum(spec["verified_by_position"])
    assert spec["accepted"] <= spec["verified"] <= spec["drafted"]


async def test_greedy_text_is_the_same_with_and_without_speculation(server: Process) -> None:
    async with Client(server.address) as connection:
        texts = [
            await connection.complete(CODE, Options(temperature=0, max_tokens=48, speculation=mode))
            for mode in ("off", "auto", "fixed", "threshold")
        ]
    assert len({text.token_ids for text in texts}) == 1
    assert texts[0].finished.speculation.drafted == 0
    assert texts[2].finished.speculation.accepted > 0


async def test_a_seed_fixes_the_text_under_every_mode_and_load(server: Process) -> None:
    async with Client(server.address) as connection:

        async def one(mode: str) -> Completion:
            options = Options(temperature=1.0, seed=7, max_tokens=24, speculation=mode)
            return await connection.complete(CODE, options)

        modes = ("off", "fixed", "threshold", "auto")
        alone = [await one(mode) for mode in modes]
        together = await asyncio.gather(*(one(mode) for mode in modes * 3))
    assert len({text.token_ids for text in (*alone, *together)}) == 1


async def test_stop_strings_do_not_depend_on_rounds(server: Process) -> None:
    async with Client(server.address) as connection:
        plain = await connection.complete(CODE, Options(temperature=0, max_tokens=60, speculation="off"))
        middle = len(plain.text) // 2
        stop = plain.text[middle : middle + 5]
        ended = [
            await connection.complete(CODE, Options(temperature=0, max_tokens=60, speculation=mode, stop=[stop]))
            for mode in ("off", "fixed", "auto")
        ]
    assert {text.text for text in ended} == {plain.text[: plain.text.index(stop)]}
    assert {text.finished.reason for text in ended} == {"stop_string"}
    assert len({text.token_ids for text in ended}) == 1


async def test_a_conversation_finds_its_beginning_in_the_cache(server: Process) -> None:
    async with Client(server.address) as connection:
        messages = [Message("user", "Write a function that adds two numbers, and then explain what it does.")]
        first = await connection.complete(Chat(messages), Options(max_tokens=40, temperature=0))
        messages += [Message("assistant", first.text), Message("user", "Again.")]
        second = await connection.complete(Chat(messages), Options(max_tokens=8, temperature=0))
    assert second.finished.usage.cached_tokens >= first.finished.usage.prompt_tokens // 16 * 16


async def test_a_storm_leaves_every_page_free(server: Process) -> None:
    generator = random.Random(3)

    async def one(connection: Client, number: int) -> None:
        options = Options(max_tokens=generator.randrange(1, 60), temperature=generator.choice([0.0, 1.0]), seed=number)
        events = connection.generate(f"# item {number}\nimport os\n" * generator.randrange(1, 6), options)
        async for _ in events:
            if generator.random() < 0.2:
                break
        await events.aclose()

    async with Client(server.address) as connection:
        await asyncio.gather(*(one(connection, number) for number in range(48)))
        for _ in range(200):
            load = (await connection.info())["load"]
            if not load["running"] and not load["waiting"]:
                break
            await asyncio.sleep(0.05)
    assert (load["running"], load["waiting"]) == (0, 0)
    assert load["pages_free"] + load["pages_cached"] == load["pages_total"]


async def test_logprobs_come_with_every_token(server: Process) -> None:
    async with Client(server.address) as connection:
        completion = await connection.complete(CODE, Options(temperature=0, max_tokens=12, logprobs=3))
    assert [p.token_id for p in completion.logprobs] == list(completion.token_ids)
    for logprob in completion.logprobs:
        assert len(logprob.alternatives) == 3
        assert logprob.alternatives[0] == (logprob.token_id, logprob.logprob)


async def test_the_context_ends_a_request_that_gives_no_limit(server: Process) -> None:
    async with Client(server.address) as connection:
        longest = (await connection.info())["max_model_len"]
        ids = (await connection.tokenize("x = 1\n") * longest)[: longest - 3]
        completion = await connection.complete(ids, Options(ignore_eos=True))
        assert (completion.finished.reason, len(completion.token_ids)) == ("context", 3)
        with pytest.raises(ServerError, match="INVALID_ARGUMENT"):
            await connection.complete([*ids, 5, 5, 5])


async def test_a_deadline_frees_the_engine(server: Process) -> None:
    async with Client(server.address) as connection:
        with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
            await connection.complete(CODE, Options(ignore_eos=True), timeout_s=0.15)
        await asyncio.sleep(0.3)
        assert (await connection.info())["load"]["running"] == 0


def test_info_and_refusals_on_the_command_line(server: Process) -> None:
    info = json.loads(client(server.address, "info", "--json"))
    assert info["drafter"]["kind"] == "dspark"
    error = client(server.address, "generate", "--prompt", "x", "--temperature", "-1", code=1)
    assert "sampling.temperature" in error


def test_every_finished_request_has_its_line(server: Process) -> None:
    generate(server.address, CODE, "--max-tokens", "5", "--request-id", "find-me")
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (line["status"], line["completion_tokens"]) == ("OK", 5)
    assert {"rounds", "drafted", "verified", "accepted", "acceptance_by_position"} <= set(line)
    assert lines[0]["event"] == "configuration"
