"""`python -m clients chat`: a conversation in the terminal, or lines from a pipe."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clients.client import Client, Collector, Completion
from clients.errors import ServerError
from clients.events import Chat, Delta, Message, Options
from clients.interrupts import interrupts
from clients.render import DIM, Screen, error_lines

HELP = """\
/history      the conversation so far
/reset        start over; the system message stays
/save FILE    write the conversation to a file, as JSON
/help         this text
/quit         leave; so does Ctrl-D
Ctrl-C stops a reply; what there is of it stays in the conversation. A line of \"\"\" begins a message of several lines,
and another one ends it."""
FENCE = '"""'


@dataclass
class Conversation:
    """Who said what. A reply that was stopped stands as far as it came."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [Message("system", self.system)] if self.system else []

    def save(self, path: Path) -> None:
        """Writes [{"role": …, "content": …}, …].

        Raises:
            OSError: the file cannot be written.
        """
        told = [asdict(message) for message in self.messages]
        path.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@dataclass
class _Reply:
    """As far as it came."""

    text: str = ""


class ChatSession:
    """Reads what the user says, and streams what the model answers.

    Args:
        template_arguments: passed to the model's chat template.
        timeout_s: deadline of each reply.
    """

    def __init__(
        self,
        client: Client,
        screen: Screen,
        options: Options,
        conversation: Conversation,
        template_arguments: dict[str, Any],
        timeout_s: float | None,
    ) -> None:
        self._client = client
        self._screen = screen
        self._options = options
        self._conversation = conversation
        self._template_arguments = template_arguments
        self._timeout_s = timeout_s
        self._interactive = sys.stdin.isatty()
        self.failures = 0

    async def run(self) -> int:
        """Until the end of input or /quit. Returns 1 when input came from a pipe and a reply failed, else 0."""
        self._screen.legend()
        if self._interactive:
            self._screen.line(self._screen.paint("/help tells what there is; Ctrl-D ends", DIM))
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then edits lines and recalls earlier ones
        for said in self._lines():
            if said.startswith("/") and "\n" not in said:
                if said in ("/quit", "/exit"):
                    break
                self._command(said)
            else:
                await self._turn(said)
        return 1 if self.failures and not self._interactive else 0

    def _lines(self) -> Iterator[str]:
        """What was said, without empty lines; several lines between fences are one."""
        while (line := self._read("you> ")) is not None:
            if line.strip() == FENCE:
                block: list[str] = []
                while (line := self._read("...> ")) is not None and line.strip() != FENCE:
                    block.append(line)
                line = "\n".join(block)
            if line and line.strip():
                yield line if "\n" in line else line.strip()

    def _read(self, prompt: str) -> str | None:
        """One line; None at the end of input. Blocks the event loop, which has nothing else to do meanwhile."""
        if not self._interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        while True:
            try:
                with _interrupts_raise():
                    return input(prompt)
            except EOFError:
                self._screen.line()
                return None
            except KeyboardInterrupt:
                self._screen.line(self._screen.paint("\n/quit or Ctrl-D ends", DIM))

    def _command(self, said: str) -> None:
        name, _, rest = said.partition(" ")
        if name == "/help":
            self._screen.line(HELP)
        elif name == "/history":
            for message in self._conversation.messages:
                self._screen.line(self._screen.paint(f"{message.role}> ", DIM) + message.content)
        elif name == "/reset":
            self._conversation.reset()
            self._screen.line(self._screen.paint("a new conversation", DIM))
        elif name == "/save":
            self._save(rest.strip())
        else:
            self._screen.line(f"there is no {name}; /help tells what there is")

    def _save(self, name: str) -> None:
        if not name:
            self._screen.line("where to? /save FILE")
            return
        try:
            self._conversation.save(Path(name).expanduser())
        except OSError as error:
            self._screen.line(f"cannot write {name}: {error.strerror or error}")
        else:
            self._screen.line(self._screen.paint(f"{len(self._conversation.messages)} messages in {name}", DIM))

    async def _turn(self, said: str) -> None:
        messages = self._conversation.messages
        messages.append(Message("user", said))
        chat = Chat(tuple(messages), self._template_arguments)
        reply = _Reply()
        completion = None
        try:
            with interrupts(asyncio.ensure_future(self._stream(chat, reply))) as task:
                completion = await task
        except asyncio.CancelledError:
            if (whole := asyncio.current_task()) is not None and whole.cancelling():
                raise  # not the reply was to stop, but everything
        except ServerError as error:
            self.failures += 1
            self._screen.line("\n".join(error_lines(error)))
            if not reply.text:
                messages.pop()
                return
        messages.append(Message("assistant", reply.text))
        self._screen.line("\n" + self._screen.paint(_facts(completion), DIM))

    async def _stream(self, chat: Chat, reply: _Reply) -> Completion:
        collector = Collector()
        async with aclosing(self._client.generate(chat, self._options, timeout_s=self._timeout_s)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    reply.text += event.text
                    self._screen.delta(event)
                if (completion := collector.add(event)) is not None:
                    return completion
        raise AssertionError("generate() ends with its last event or an error")


def _facts(completion: Completion | None) -> str:
    if completion is None:
        return "[stopped]"
    usage, spec = completion.finished.usage, completion.finished.speculation
    return (
        f"[{usage.completion_tokens} tokens, {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens"
        f" cached, mean accepted length {spec.mean_accepted_length:.2f}, {completion.tokens_per_s:.0f} tokens/s]"
    )


@contextmanager
def _interrupts_raise() -> Iterator[None]:
    """While inside, Ctrl-C raises KeyboardInterrupt; asyncio's own handler would only cancel what waits for us."""
    before: Callable[..., Any] | int | None = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def run(client: Client, given: argparse.Namespace, options: Options, template_arguments: dict[str, Any]) -> int:
    """The command. Returns its exit code."""
    conversation = Conversation(given.system)
    return await ChatSession(client, Screen(), options, conversation, template_arguments, given.timeout).run()
