"""`python -m clients chat`: commands, interruptions, a terminal and a pipe."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import sys
import threading
from pathlib import Path

import pytest

from clients.__main__ import run
from tests.server.conftest import Launch, Running, until

ROOT = Path(__file__).resolve().parents[2]


def prompts_of(running: Running) -> list[str]:
    tokenizer = running.server.service._checkpoint.tokenizer
    return [tokenizer.decode(request.prompt, skip_special=False) for request in running.engine.seen]


async def talk(running: Running, monkeypatch: pytest.MonkeyPatch, text: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return await run(["chat", "--server", running.address, *flags])


async def test_commands(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    running = await launch("hello")
    kept = tmp_path / "kept.json"
    said = f"first\n/save {kept}\n/history\n/reset\nsecond\n/help\n/dance\n/save\n/save /no/such/folder/x\n"
    assert await talk(running, monkeypatch, said, "--system", "be brief") == 0
    assert json.loads(kept.read_text()) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "hello"},
    ]
    assert "first" not in prompts_of(running)[1]
    assert "be brief" in prompts_of(running)[1]
    shown = capsys.readouterr().out
    for part in ("user> first", "assistant> hello", "/reset", "there is no /dance", "/save FILE", "cannot write /no"):
        assert part in shown


async def test_fences_hold_several_lines(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await launch("hello")
    assert await talk(running, monkeypatch, '"""\n/not a command\n  two\n"""\nthen\n') == 0
    first, _ = prompts_of(running)
    assert "<|start|>user\n/not a command\n  two<|end|>" in first


async def test_a_pipe_learns_of_failures(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = await launch("hello")
    assert await talk(running, monkeypatch, "first\n", "--temperature", "-1") == 1
    assert "sampling.temperature" in capsys.readouterr().out


async def test_an_interruption_stops_the_reply_and_not_the_program(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Semaphore(3)
    running = await launch("hello world " * 20, eos=False, gate=gate)
    handler = signal.getsignal(signal.SIGINT)
    talking = asyncio.ensure_future(talk(running, monkeypatch, "first\nsecond\n", "--max-tokens", "400"))
    await until(lambda: running.engine.rounds >= 3)
    await until(lambda: "hello" in capsys.readouterr().out)
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: "[stopped]" in capsys.readouterr().out)
    gate.release(10_000)
    assert await talking == 0
    assert signal.getsignal(signal.SIGINT) is handler
    first, second = prompts_of(running)
    begun = second.removeprefix(first).split("<|end|>")[0]
    assert begun.startswith("hello")  # what there was of the reply is part of the conversation
    assert len(begun) < len("hello world " * 20)


async def test_a_terminal(launch: Launch, tmp_path: Path) -> None:
    gate = threading.Semaphore(0)
    running = await launch("hello world " * 20, eos=False, gate=gate)
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clients", "chat", "--server", running.address, "--max-tokens", "30"),
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    shown = ""

    async def see(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += (await asyncio.to_thread(os.read, ours, 4096)).decode()
        shown = shown.split(text, 1)[1]

    async with asyncio.timeout(60):
        await see("you> ")
        process.send_signal(signal.SIGINT)  # where nothing runs: a hint, and the prompt again
        await see("/quit or Ctrl-D ends")
        await see("you> ")
        os.write(ours, b"first\n")
        await until(lambda: bool(running.engine.seen))
        gate.release(1)
        await see("hello")
        process.send_signal(signal.SIGINT)
        await see("[stopped]")
        await see("you> ")
        gate.release(10_000)
        os.write(ours, b"second\n")
        await see("[30 tokens, ")
        await see("you> ")
        os.write(ours, b"\x04")
        assert await process.wait() == 0
    os.close(ours)
