"""`python -m clients watch`: the scheduler at work, live in a terminal, as lines elsewhere, or as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from rich.console import Console
from rich.live import Live

from clients.client import Client
from clients.errors import DeadlineExceeded
from clients.scheduler import Record, SchedulerClient
from clients.trend import Trend
from clients.watch_view import SECONDS, decision, line, screen

REFRESH_S = 0.25
PATIENCE_S = 1.0  # without a round, until --once says what it waits for


async def run(given: argparse.Namespace, client: Client) -> int:
    """Until the server ends the stream, the reader closes the pipe, or Ctrl-C."""
    async with client:
        scheduler = SchedulerClient(client)
        if given.once or given.json:
            try:
                return await (_once if given.once else _print)(scheduler, given)
            except BrokenPipeError:  # the reader has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
        info = await client.info(timeout_s=given.timeout)
        title = f"{info['model']} · {info['drafter']['kind']} · {given.server}"
        return await _follow(scheduler, given, title)


async def _print(scheduler: SchedulerClient, given: argparse.Namespace) -> int:
    """Records as they come; only the newest with --once."""
    history = max(given.history, 1) if given.once else given.history
    stream = scheduler.watch(every=given.every, history=history, buffer=given.buffer, timeout_s=given.timeout)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    async with aclosing(stream) as batches:
        async for records, lost in batches:
            if lost:
                print(f"{lost} rounds lost: this reader was too slow", file=sys.stderr)
            for record in records[-1:] if given.once else records:
                if given.json:
                    print(json.dumps(record), flush=True)
                else:
                    console.print(decision(record, console.width))
            if given.once and records:
                return 0
    return 0


async def _once(scheduler: SchedulerClient, given: argparse.Namespace) -> int:
    """The newest record; 1 when there was none in the time given."""
    printing = asyncio.ensure_future(_print(scheduler, given))
    try:
        done, _ = await asyncio.wait([printing], timeout=PATIENCE_S)
        if not done:
            limit = (
                f"for {given.timeout:g} s at most" if given.timeout else "--timeout SECONDS sets a limit, Ctrl-C ends"
            )
            print(f"no rounds yet: waiting for somebody to generate ({limit})", file=sys.stderr, flush=True)
        return await printing
    except DeadlineExceeded:
        print(f"no round within {given.timeout:g} s: nobody generates", file=sys.stderr)
        return 1
    finally:
        printing.cancel()


async def _follow(scheduler: SchedulerClient, given: argparse.Namespace, title: str) -> int:
    trend, console = Trend(SECONDS), Console()
    stream = scheduler.watch(every=given.every, history=given.history, buffer=given.buffer, timeout_s=given.timeout)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, screen=True) as live:

            def show() -> None:
                live.update(screen(trend, title, console.width, console.height), refresh=True)

            await _feed(stream, trend, show, REFRESH_S)
    else:
        print(f"# {title}", flush=True)
        await _feed(stream, trend, lambda: print(line(trend), flush=True), 1.0)
    return 0


async def _feed(stream: Any, trend: Trend, show: Callable[[], None], refresh_s: float) -> None:
    """Takes in what comes and shows it regularly, also while nothing comes."""

    async def read() -> None:
        async with aclosing(stream) as batches:
            async for records, lost in batches:
                trend.add(past(records), time.time(), lost)

    reading = asyncio.ensure_future(read())
    try:
        while not reading.done():
            await asyncio.wait([reading], timeout=refresh_s)
            trend.tick(time.time())
            show()
        reading.result()
    finally:
        reading.cancel()


def past(records: list[Record]) -> list[Record]:
    """Without rounds of which nobody knows when they were, but for the last: they would all count for this second."""
    return [r for r in records if r["ended_s"] is not None] or records[-1:]
