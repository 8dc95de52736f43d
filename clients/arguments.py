"""The command line's flags, and what they mean for the client."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from clients.connection import add_flags
from clients.events import Options, Prompt
from clients.load import command as load

DEFAULT_SERVER = "127.0.0.1:50051"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clients", description="Talk to a dspark.v1 server.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="complete one prompt")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file; - is standard input")
    source.add_argument("--token-ids", type=_ids, metavar="ID,ID,…", help="the prompt as token ids")
    generate.add_argument("--echo", action="store_true", help="show the prompt before the text")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    _connection(generate)
    _generation(generate)

    chat = commands.add_parser("chat", help="hold a conversation; /help tells what there is")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument(
        "--template-argument", action="append", default=[], metavar="NAME=JSON",
        help="passed to the model's chat template, such as enable_thinking=false",
    )  # fmt: skip
    _connection(chat)
    _generation(chat)

    info = commands.add_parser("info", help="what the server serves, and how busy it is")
    info.add_argument("--json", action="store_true")
    _connection(info)

    watch = commands.add_parser("watch", help="the scheduler's decisions, live")
    watch.add_argument("--json", action="store_true", help="print one decision record a line instead")
    watch.add_argument("--once", action="store_true", help="print the newest decision and end; waits for one")
    watch.add_argument("--every", type=_at_least(1), default=1, metavar="N", help="only every Nth round")
    watch.add_argument("--history", type=_at_least(0), default=0, metavar="N", help="begin with N past rounds")
    watch.add_argument(
        "--buffer", type=_at_least(1), metavar="N", help="rounds that the server holds for a slow reader"
    )
    _connection(watch)

    policy = commands.add_parser("policy", help="show what decides; with flags, change it while the server runs")
    policy.add_argument("--name", metavar="NAME", help="plain, fixed, threshold, causal, relayed or auto")
    for name in ("draft-tokens", "max-running", "prefill-chunk", "max-queue"):
        policy.add_argument(f"--{name}", type=_at_least(0), metavar="N")
    policy.add_argument("--confidence-threshold", type=float, metavar="X")
    policy.add_argument("--reset", action="append", default=[], metavar="FIELD",
        help="back to what the server was started with, such as draft_tokens; may be given several times")  # fmt: skip
    policy.add_argument("--json", action="store_true")
    _connection(policy)

    load_ = commands.add_parser("load", help="send many requests at given times, and measure what their users see")
    _connection(load_)
    load_.set_defaults(timeout=120.0)
    load.add_flags(load_)

    demo = commands.add_parser("demo", help="start a server on the embedded model and show speculation at work")
    demo.add_argument("--max-tokens", type=_at_least(2), default=160)
    return parser


def _connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help="default %(default)s")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of a call")
    add_flags(parser)


def _generation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--request-id", default="", help="your name for the call")
    for name in ("max-tokens", "min-tokens", "top-k", "seed", "logprobs", "draft-tokens", "max-draft-tokens"):
        add(f"--{name}", type=_at_least(0), metavar="N")
    for name in ("temperature", "top-p", "min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"):
        add(f"--{name}", type=float, metavar="X")
    add("--confidence-threshold", type=float, metavar="X", help="verify while predicted acceptance is at least this")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    add("--stop-token-ids", type=_ids, metavar="ID,ID,…")
    add("--logit-bias", type=_biases, metavar="ID:BIAS,…")
    add("--ignore-eos", action="store_true", help="go on past the model's end token")
    add("--speculation", choices=("off", "fixed", "threshold", "auto"))
    add("--verification", choices=("rejection", "coupled"))
    add("--priority", type=int, default=0)
    add("--min-tokens-per-s", type=float, default=0.0, metavar="X")
    add("--cache-salt", default="", metavar="TEXT", help="share cached prefixes only under the same salt")


def options_from(given: argparse.Namespace) -> Options:
    """Flags that were given, as options."""
    names = {field.name for field in fields(Options)}
    return Options(**{name: value for name, value in vars(given).items() if name in names and value is not None})


def prompt_from(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Prompt:
    if given.token_ids is not None:
        ids: list[int] = given.token_ids
        return ids
    if given.prompt_file is None:
        text: str = given.prompt
        return text
    try:
        if given.prompt_file == "-":
            return sys.stdin.read()
        return Path(given.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--prompt-file {given.prompt_file}: {error}")


def template_arguments(given: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """NAME=JSON pairs; what is not JSON is a string."""
    arguments: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            parser.error(f"--template-argument {pair!r} is not NAME=JSON")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _at_least(low: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value < 2**64:
            raise argparse.ArgumentTypeError(f"must be at least {low} and fit 64 bits")
        return value

    return number


def _ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids, such as 12,7,300") from None
    if any(not 0 <= token < 2**32 for token in ids):
        raise argparse.ArgumentTypeError("token ids are from 0 to 2^32 - 1")
    return ids


def _biases(text: str) -> dict[int, float]:
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:BIAS,…, such as 12:-100,7:2.5") from None
