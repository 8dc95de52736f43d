"""`python -m clients generate|chat|info|watch|policy|load|demo`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from clients import chat, demo, watch
from clients.arguments import build_parser, options_from, prompt_from, template_arguments
from clients.client import Client, Collector, Completion, ServerError
from clients.connection import tls_from, token_from
from clients.events import Delta, Prompt
from clients.load import command as load
from clients.render import Screen, error_lines
from clients.retry import NEVER, Retry
from clients.scheduler import POLICY_FIELDS, SchedulerClient


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when the server refused; wrong usage ends the process with 2."""
    try:
        return asyncio.run(run(arguments))
    except KeyboardInterrupt:
        return 130


async def run(arguments: Sequence[str] | None = None) -> int:
    """One command, inside a running event loop."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        return await _COMMANDS[given.command](given, parser)
    except ServerError as error:
        print("\n".join([*error_lines(error), *_advice(error, given)]), file=sys.stderr)
        return 1


def _advice(error: ServerError, given: argparse.Namespace) -> list[str]:
    """What a flag may mend."""
    if error.code == "UNAUTHENTICATED":
        return ["  --token-file FILE, or the variable DSPARK_TOKEN, gives a token"]
    answered = error.retry_after_s is not None or error.request_id
    if error.code == "UNAVAILABLE" and not answered and not (given.tls or given.tls_ca or given.server_name):
        return [f"  does a server listen at {given.server}? One with TLS needs --tls or --tls-ca FILE"]
    return []


def _connect(given: argparse.Namespace, parser: argparse.ArgumentParser, retry: Retry | None = None) -> Client:
    return Client(given.server, token=token_from(given, parser), tls=tls_from(given, parser), retry=retry)


async def _generate(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    prompt = prompt_from(given, parser)
    screen = Screen()
    async with _connect(given, parser) as client:
        collector = Collector()
        shown = not given.json
        if shown:
            screen.legend()
            screen.prompt(given.prompt if given.echo and given.prompt else "")
        completion = await _stream(client, prompt, given, collector, screen if shown else None)
    if given.json:
        print(json.dumps(as_json(completion, logprobs=given.logprobs is not None), ensure_ascii=False))
        return 0
    screen.line("\n")
    screen.summary(completion)
    return 0


async def _stream(
    client: Client, prompt: Prompt, given: argparse.Namespace, collector: Collector, screen: Screen | None
) -> Completion:
    events = client.generate(prompt, options_from(given), request_id=given.request_id, timeout_s=given.timeout)
    async with aclosing(events):
        async for event in events:
            if screen is not None and isinstance(event, Delta):
                screen.delta(event)
            if (completion := collector.add(event)) is not None:
                return completion
    raise ServerError("UNKNOWN", "the stream ended without its last message")


async def _chat(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    arguments = template_arguments(given.template_argument, parser)
    async with _connect(given, parser) as client:
        return await chat.run(client, given, options_from(given), arguments)


async def _info(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    async with _connect(given, parser) as client:
        info = await client.info(timeout_s=given.timeout)
    if given.json:
        print(json.dumps(info))
        return 0
    for name, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {child}" for key, child in value.items())
        print(f"{name:18} {value}")
    return 0


async def _watch(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return await watch.run(given, _connect(given, parser))


async def _policy(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    changes = {name: value for name in POLICY_FIELDS if (value := getattr(given, name)) is not None}
    async with _connect(given, parser) as client:
        scheduler = SchedulerClient(client)
        if changes or given.reset:
            await scheduler.update_policy(changes, given.reset, timeout_s=given.timeout)
        answer = await scheduler.policy(timeout_s=given.timeout)
    if given.json:
        print(json.dumps(answer))
        return 0
    for name, value in answer["policy"].items():
        first = answer["initial"][name]
        note = "" if value == first else f"  (started with {'no value' if first is None else first})"
        print(f"{name:22} {'–' if value is None else value}{note}")
    print(f"{'names':22} {', '.join(answer['names'])}")
    return 0


async def _load(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    async with _connect(given, parser, NEVER) as client:  # a second try would hide that the first one failed
        return await load.run(client, given, options_from(given), parser)


async def _demo(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    return await demo.run(Screen(), max_tokens=given.max_tokens)


_COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "info": _info,
    "watch": _watch,
    "policy": _policy,
    "load": _load,
    "demo": _demo,
}


def as_json(completion: Completion, *, logprobs: bool = False) -> dict[str, Any]:
    """The object that `--json` prints."""
    finished = completion.finished
    answer: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": finished.reason,
        "usage": asdict(finished.usage),
        "speculation": asdict(finished.speculation),
        "timing": {
            "ttft_s": completion.ttft_s,
            "total_s": completion.total_s,
            "tokens_per_s": completion.tokens_per_s,
        },
    }
    if logprobs:
        answer["logprobs"] = [asdict(logprob) for logprob in completion.logprobs]
    return answer


if __name__ == "__main__":
    sys.exit(main())
