"""Chat templates render in a process of their own: `python -m server.template_process` is it.

A template is a program that came with the weights. Jinja's sandbox keeps it from reaching into Python, but not from
running for hours or taking all memory, at compiling already. Here it gets a few seconds, a share of memory and nothing
else: no file to write, no variable of the server's environment. Messages are JSON after their length.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from server.chat import ChatError, ChatTemplate, TemplateSource
from server.logs import log

RENDER_S = 5.0
START_S = 30.0  # an interpreter on a busy machine, and compiling
PROCESSES = 2
MEMORY = 512 * 2**20
_ROOT = Path(__file__).resolve().parent.parent
_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG = 1


class TemplateTooSlow(Exception):
    """The template did not come to an end, or took its process with it."""


class Renderer:
    """Renders one template for one event loop.

    Args:
        limit: characters that a rendered conversation may have.
        render_s: seconds that it may take.
        start_s: seconds for starting a process, compiling included.
    """

    def __init__(
        self, template: TemplateSource, limit: int, render_s: float = RENDER_S, start_s: float = START_S
    ) -> None:
        self._template = template
        self._limit = limit
        self._render_s = render_s
        self._start_s = start_s
        self._idle: list[asyncio.subprocess.Process] = []
        self._places = asyncio.Semaphore(PROCESSES)

    async def start(self) -> None:
        """Compiles the template, so that a bad one is found before anybody asks.

        Raises:
            ValueError: it is not valid, or does not come to an end.
        """
        try:
            self._idle.append(await self._spawn())
        except (TemplateTooSlow, ChatError) as error:
            raise ValueError(str(error)) from error

    async def render(
        self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any], *, add_generation_prompt: bool
    ) -> str:
        """The prompt's text.

        Raises:
            ChatError: the template refuses the messages, fails on them, or takes too long for them.
        """
        question = {
            "messages": list(messages),
            "arguments": dict(arguments),
            "add_generation_prompt": add_generation_prompt,
            "limit": self._limit,
        }
        async with self._places:
            process = self._idle.pop() if self._idle else None
            answered = False
            try:
                if process is None:
                    process = await self._spawn()
                answer = await _ask(process, question, self._render_s)
                answered = True
            except TemplateTooSlow as error:
                log("template_stopped", level=logging.WARNING, reason=str(error))
                raise ChatError("", f"the model's chat template on these messages: {error}") from error
            finally:
                if answered and process is not None:
                    self._idle.append(process)
                elif process is not None:
                    await _end(process)
        return _text(answer)

    async def stop(self) -> None:
        """Ends the idle processes; one that renders ends with its call."""
        while self._idle:
            await _end(self._idle.pop())

    async def _spawn(self) -> asyncio.subprocess.Process:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                "PYTHONPATH": path,
                "PATH": os.defpath,
                "TZ": os.environ.get("TZ", ""),
            },  # the server's own may hold secrets
            start_new_session=True,  # Ctrl-C is for the server alone
        )
        compiled = False
        try:
            _text(await _ask(process, self._template._asdict(), self._start_s))
            compiled = True
        finally:
            if not compiled:
                await _end(process)
        return process


async def _ask(process: asyncio.subprocess.Process, question: Any, limit_s: float) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    body = json.dumps(question).encode()
    try:
        async with asyncio.timeout(limit_s):
            process.stdin.write(_LENGTH.pack(len(body)) + body)
            await process.stdin.drain()
            (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
            answer: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
            return answer
    except TimeoutError:
        raise TemplateTooSlow(f"not done after {limit_s:g} s") from None
    except (asyncio.IncompleteReadError, ConnectionError, RuntimeError):  # uvloop's error for a pipe that has closed
        raise TemplateTooSlow("it used up the memory that templates get") from None


def _text(answer: Mapping[str, Any]) -> str:
    if "message" in answer:
        raise ChatError(answer["field"], answer["message"])
    return str(answer["text"])


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()


def main() -> int:
    """Serves until stdin ends: the template first, then conversations."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = _receive(sys.stdin.buffer)
    if first is None:
        return 0
    try:
        template = ChatTemplate(**first)
    except Exception as error:  # compiling runs parts of the template
        _send({"field": "", "message": str(error) or type(error).__name__})
        return 0
    _send({"text": ""})
    while (question := _receive(sys.stdin.buffer)) is not None:
        _send(_answer(template, **question))
    return 0


def _answer(template: ChatTemplate, *, limit: int, **question: Any) -> dict[str, str]:
    try:
        text = template.render(**question)
    except ChatError as error:
        return {"field": error.field, "message": error.message}
    if len(text) > limit:
        return {"field": "", "message": f"rendered, it has {len(text)} characters; at most {limit} are taken"}
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return {"field": "", "message": "the model's chat template wrote half a character"}
    return {"text": text}


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    return json.loads(stream.read(_LENGTH.unpack(header)[0]))


def _send(answer: Mapping[str, str]) -> None:
    body = json.dumps(answer).encode()
    sys.stdout.buffer.write(_LENGTH.pack(len(body)) + body)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
