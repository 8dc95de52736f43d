"""`python -m clients`: what it prints, and how it ends."""

from __future__ import annotations

import io
import json
import sys

import pytest

from clients import watch
from clients.__main__ import run
from clients.events import Delta
from clients.render import DRAFTED, OWN, Screen, wants_colour
from tests.server.conftest import Launch

REPLY = "hello world, naïve 🙂 done"


async def test_json_has_exactly_the_promised_keys(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    running = await launch(REPLY)
    line = ["generate", "--server", running.address, "--prompt", "hi", "--max-tokens", "40", "--json"]
    assert await run(line) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["text", "token_ids", "finish_reason", "usage", "speculation", "timing"]
    assert list(answer["speculation"]) == [
        "rounds",
        "drafted",
        "verified",
        "accepted",
        "mean_accepted_length",
        "verified_by_position",
        "accepted_by_position",
        "acceptance_by_position",
        "mean_verify_budget",
        "draft_skip_share",
    ]
    assert list(answer["timing"]) == ["ttft_s", "total_s", "tokens_per_s"]
    assert list(answer["usage"]) == ["prompt_tokens", "completion_tokens", "cached_tokens"]
    assert (answer["text"], answer["finish_reason"]) == (REPLY, "stop_token")
    assert await run([*line, "--logprobs", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["logprobs"]) == len(answer["token_ids"])


async def test_flags_reach_the_engine(launch: Launch) -> None:
    running = await launch()
    flags = (
        "--max-tokens 9 --min-tokens 1 --temperature 0.5 --top-k 3 --top-p 0.8 --min-p 0.1 --repetition-penalty 1.2"
        " --presence-penalty 0.5 --frequency-penalty 0.25 --seed 18446744073709551615 --stop xx --stop yy"
        " --stop-token-ids 4,5 --logit-bias 7:-100,8:2 --ignore-eos --speculation fixed --draft-tokens 2"
        " --max-draft-tokens 3 --verification coupled --priority -2 --cache-salt s --logprobs 2"
    )
    assert await run(["generate", "--server", running.address, "--token-ids", "5,6", "--json", *flags.split()]) == 0
    (request,) = running.engine.seen
    assert request.prompt == (5, 6)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.8, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 0.5, 0.25)
    assert (sampling.seed, sampling.logit_bias) == (2**64 - 1, ((7, -100.0), (8, 2.0)))
    assert (request.end.max_tokens, request.end.min_tokens, request.end.stop_ids) == (9, 1, frozenset({4, 5}))
    speculation = request.speculation
    assert (speculation.mode.value, speculation.draft_tokens, speculation.max_draft_tokens) == ("fixed", 2, 3)
    assert speculation.verification is not None
    assert speculation.verification.value == "coupled"
    assert (request.priority, request.cache_salt, request.logprobs) == (-2, "s", 2)


async def test_text_and_summary(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await launch(REPLY)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert await run(["generate", "--server", running.address, "--prompt-file", "-"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(REPLY)
    assert "\x1b" not in shown
    assert "mean accepted length 2.33" in shown
    assert "draft 1" in shown


async def test_chat_keeps_the_conversation(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await launch("hello")
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n/quit\nnever\n"))
    line = ["chat", "--server", running.address, "--system", "be brief", "--template-argument", "thinking=1"]
    assert await run(line) == 0
    checkpoint = running.server.service._checkpoint
    prompts = [checkpoint.tokenizer.decode(request.prompt, skip_special=False) for request in running.engine.seen]
    turn = "<|start|>{}\n{}<|end|>\n"
    start = turn.format("system", "be brief") + turn.format("user", "first")
    assert prompts[0] == start + "<|start|>assistant\n[1]"
    after = start + turn.format("assistant", "hello") + turn.format("user", "second")
    assert prompts[1] == after + "<|start|>assistant\n[1]"
    assert "mean accepted length" in capsys.readouterr().out


async def test_info(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    running = await launch()
    assert await run(["info", "--server", running.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drafter"]["kind"] == "dspark"
    assert await run(["info", "--server", running.address]) == 0
    assert "scripted" in capsys.readouterr().out


async def test_a_refusal_is_readable_and_ends_with_1(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    running = await launch()
    line = ["generate", "--server", running.address, "--prompt", "hi", "--temperature", "-1", "--request-id", "me"]
    assert await run(line) == 1
    error = capsys.readouterr().err
    assert "INVALID_ARGUMENT" in error
    assert "sampling.temperature: must be" in error
    assert "request me" in error
    assert await run(["info", "--server", "127.0.0.1:1", "--timeout", "5"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "generate",
        "generate --prompt a --prompt-file b",
        "generate --prompt a --max-tokens -1",
        "generate --prompt a --seed 18446744073709551616",
        "generate --prompt a --temperature warm",
        "generate --prompt a --speculation maybe",
        "generate --prompt a --logit-bias x",
        "generate --token-ids one",
        "generate --prompt-file /no/such/file",
        "chat --template-argument broken",
        "sing",
    ],
)
async def test_wrong_usage_ends_with_2(line: str) -> None:
    with pytest.raises(SystemExit) as end:
        await run(line.split())
    assert end.value.code == 2


def test_colours_tell_drafts_from_the_targets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = Delta("abcd", (1, 2, 3), (2, 1, 1), (True, True, False), (), None)
    out = io.StringIO()
    Screen(out, colour=True).delta(delta)
    assert out.getvalue() == f"{DRAFTED}abc\x1b[0m{OWN}d\x1b[0m"
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert not wants_colour(out)


async def test_watching_once_says_what_it_waits_for(
    launch: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_S", 0.0)
    running = await launch()
    line = ["watch", "--server", running.address, "--once"]
    assert await run([*line, "--timeout", "0.2"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "no rounds yet" in said.err and "no round within 0.2 s" in said.err
    assert await run(["generate", "--server", running.address, "--prompt", "hi", "--max-tokens", "3", "--json"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(watch, "PATIENCE_S", 60.0)
    assert await run([*line, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["policy"] and said.err == ""


async def test_who_finds_nobody_is_told_what_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["info", "--server", "127.0.0.1:1", "--timeout", "0.3"]
    assert await run(line) == 1
    said = capsys.readouterr().err
    assert "127.0.0.1:1" in said and "--tls-ca" in said
    assert await run([*line, "--tls"]) == 1
    assert "--tls-ca" not in capsys.readouterr().err
