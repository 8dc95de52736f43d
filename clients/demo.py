"""The demonstration: a server of its own, one completion in colour, and speculation against plain decoding."""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from clients.client import Client, Collector, Completion
from clients.events import Delta, Options
from clients.render import DIM, Screen

PROMPT = '''\
class Stack:
    """A last-in, first-out stack."""

    def __init__(self, items=None):
        self._items = list(items or [])

    def push(self, item):
        self._items.append(item)

    def pop(self):'''
# No newline at the end: the vocabulary has a newline and the indentation after it as one token.
REPEATS = 3
START_S = 900.0  # a first start compiles
PATIENCE_S = 8.0  # until we say what takes so long
STOP_S = 15.0


class DemoError(Exception):
    """The demonstration could not run; the message says why."""


async def run(screen: Screen, *, max_tokens: int) -> int:
    """Returns the exit code."""
    try:
        async with _server() as address:
            screen.line(screen.paint(f"serving the embedded model on {address}", DIM))
            async with Client(address) as client:
                await _show(client, screen, max_tokens)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


async def _show(client: Client, screen: Screen, max_tokens: int) -> None:
    # min_tokens: a small model may want to end early, which would leave nothing to measure.
    drafted = Options(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens, speculation="auto")
    plain = Options(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens, speculation="off")
    screen.legend()
    screen.line()
    screen.prompt(PROMPT)
    collector, completion = Collector(), None
    async with aclosing(client.generate(PROMPT, drafted, request_id="demo")) as events:
        async for event in events:
            if isinstance(event, Delta):
                screen.delta(event)
            completion = collector.add(event) or completion
    if completion is None:
        raise DemoError("the stream ended early")
    screen.line("\n")
    screen.summary(completion)
    with_draft, without, same = [], [], True
    for _ in range(REPEATS):  # interleaved, so that the machine's moods fall on both
        speculative, alone = await client.complete(PROMPT, drafted), await client.complete(PROMPT, plain)
        with_draft.append(_speed(speculative))
        without.append(_speed(alone))
        same = same and speculative.token_ids == alone.token_ids
    fast, slow = statistics.median(with_draft), statistics.median(without)
    screen.line(
        f"\nDSpark, copying where the text repeats itself, {fast:.0f} tokens/s, plain {slow:.0f} tokens/s:"
        f" {fast / slow:.2f} × as fast;"
        f" the two texts are {'identical' if same else 'NOT identical'}"
    )


def _speed(completion: Completion) -> float:
    """Decoded tokens a second, prefill left out, by the server's clock."""
    tokens = completion.finished.usage.completion_tokens - 1
    return tokens / max(completion.finished.timing.decode_s, 1e-9)


@asynccontextmanager
async def _server() -> AsyncIterator[str]:
    """A server process on a free loopback port; its log is shown only when it fails to start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--log-level", "warning"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    try:
        line = await _first_line(process.stdout)
        if not line.startswith("serving "):
            raise DemoError("the server did not start: " + (await errors).decode().strip())
        yield line.rsplit(" ", 1)[-1].strip()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        await errors


async def _first_line(out: asyncio.StreamReader) -> str:
    """What the server says once it is ready; empty when it ends before."""
    reading = asyncio.ensure_future(out.readline())
    done, _ = await asyncio.wait([reading], timeout=PATIENCE_S)
    if not done:
        waiting = "the first start compiles native code for this processor: a minute or two, this once"
        print(waiting, file=sys.stderr, flush=True)
    try:
        return (await asyncio.wait_for(reading, START_S)).decode()
    except TimeoutError:
        raise DemoError(f"the server was not ready within {START_S:g} s") from None
