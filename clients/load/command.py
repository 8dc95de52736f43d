"""`python -m clients load`: flags, the run, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from clients.client import Client
from clients.events import Options
from clients.interrupts import interrupts
from clients.load.arrivals import Arrival, Mixes, TraceEntry, make_plan, random_times, read_trace
from clients.load.plot import draw, plotting_missing
from clients.load.prompts import BUILT_IN, PromptMix, WorkloadError, parse_mix, read_prompts, texts_of
from clients.load.report import Goals, make_report, warnings
from clients.load.runner import FAILED, Runner
from clients.load.table import lines

PATIENCE_S = 10.0  # for the server to say what it serves, before the run
PROGRESS_S = 5.0
MOST = 1_000_000  # requests of one plan: they are all in memory


async def run(client: Client, given: argparse.Namespace, options: Options, parser: argparse.ArgumentParser) -> int:
    """The command. Returns 0, or 1 when not one request was answered."""
    _check(given, parser)
    if given.plot and (missing := plotting_missing()):
        print(f"load: no plot will be made: {missing}", file=sys.stderr)
    info = await client.info(timeout_s=PATIENCE_S)
    try:
        plan = await _plan(client, given)
    except WorkloadError as error:
        parser.error(str(error))
    runner = Runner(client, options, timeout_s=given.timeout, name=f"load-{secrets.token_hex(3)}", cold=given.cold)
    await _play(runner, plan)
    goals = Goals(given.ttft_goal, given.tpot_goal)
    model = {name: info[name] for name in ("model", "device", "dtype", "policy")}  # type: ignore[literal-required]
    report = {
        "server": {"address": given.server, **model, "drafter": info["drafter"]["kind"]},
        "workload": _workload(given, plan, options),
        **make_report(runner.samples, goals, warmup_s=given.warmup),
    }
    print(json.dumps(report) if given.json else "\n".join(lines(report)))
    for warning in warnings(report):
        print(f"load: {warning}", file=sys.stderr)
    return _keep(given, report, runner) or int(_all_failed(report))


def _all_failed(report: dict[str, Any]) -> bool:
    return bool(report["requests"]["offered"]) and report["requests"][FAILED] == report["requests"]["offered"]


def _check(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if given.trace is None and given.duration is None and given.requests is None:
        given.duration = 30.0
    if given.trace is None and given.speed != 1:
        parser.error("--speed: plays a trace faster; without --trace, give another --rate")
    if given.trace is not None and given.burstiness != 1:
        parser.error("--burstiness: a trace has its own arrivals; leave it out, or give --rate instead of --trace")
    if given.duration is not None and given.warmup >= given.duration:
        parser.error("--warmup: must be shorter than --duration")
    for name in ("plot", "samples"):
        path = getattr(given, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.parent}")


async def _plan(client: Client, given: argparse.Namespace) -> list[Arrival]:
    """Raises WorkloadError: a file cannot be used, or there is nothing to send."""
    prompts = read_prompts(given.prompts) if given.prompts else BUILT_IN
    entries: Iterator[TraceEntry]
    if given.trace is not None:
        trace = read_trace(given.trace)
        entries = (
            TraceEntry(e.at_s / given.speed, e.prompt, e.prompt_tokens, e.max_tokens, e.cancel_after_tokens)
            for e in trace
        )
    else:
        entries = map(TraceEntry, random_times(given.rate, given.burstiness, given.workload_seed))
    until = math.inf if given.duration is None else given.duration
    chosen = list(islice(takewhile(lambda e: e.at_s < until, entries), given.requests or MOST))
    if not any(entry.at_s >= given.warmup for entry in chosen):
        raise WorkloadError("no request arrives in this time after the warm-up: raise --duration or the rate")
    if given.prompt_tokens or any(entry.prompt_tokens for entry in chosen):
        ids = [token for text in texts_of(prompts.prompts) for token in await client.tokenize(text)]
        prompts = PromptMix(prompts.prompts, prompts.weights, tuple(ids))
    mixes = Mixes(
        prompts=prompts,
        prompt_tokens=given.prompt_tokens,
        max_tokens=given.lengths,
        cancel_share=given.cancel,
    )
    return make_plan(chosen, mixes, given.workload_seed)


async def _play(runner: Runner, plan: Sequence[Arrival]) -> None:
    """Ctrl-C ends the run early; what there is by then is reported."""
    telling = asyncio.ensure_future(_tell(runner, plan)) if sys.stderr.isatty() else None
    try:
        with interrupts(asyncio.ensure_future(runner.run(plan))) as running:
            await running
    except asyncio.CancelledError:
        if (whole := asyncio.current_task()) is not None and whole.cancelling():
            raise
    finally:
        if telling is not None:
            telling.cancel()


async def _tell(runner: Runner, plan: Sequence[Arrival]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        ended = sum(sample.end_s is not None for sample in runner.samples)
        sent = len(runner.samples)
        print(
            f"{runner.now_s:.0f} s · {sent} of {len(plan)} sent · {sent - ended} in flight · {ended} ended",
            file=sys.stderr,
        )


def _workload(given: argparse.Namespace, plan: Sequence[Arrival], options: Options) -> dict[str, Any]:
    """What was asked for, so that a report can be repeated."""
    span = plan[-1].at_s
    said = {name: value for name, value in asdict(options).items() if value not in (None, (), {}, "", False, 0, 0.0)}
    if options.temperature is not None:
        said["temperature"] = options.temperature
    return {
        "arrivals": "trace" if given.trace else "random",
        "trace": str(given.trace) if given.trace else None,
        "rate": len(plan) / span if given.trace and span else given.rate,
        "burstiness": None if given.trace else given.burstiness,
        "requests": len(plan),
        "span_s": span,
        "warmup_s": given.warmup,
        "timeout_s": given.timeout,
        "cancel_share": given.cancel,
        "cold": given.cold,
        "seed": given.workload_seed,
        "options": said,
    }


def _keep(given: argparse.Namespace, report: dict[str, Any], runner: Runner) -> int:
    """Writes the files that were asked for. Returns 1 if one could not be written."""
    try:
        if given.samples:
            rows = (
                {**asdict(sample), "ttft_s": sample.ttft_s, "tpot_s": sample.tpot_s, "e2e_s": sample.e2e_s}
                for sample in runner.samples
            )
            given.samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if given.plot and not plotting_missing():
            draw(report, runner.samples, runner.tokens_by_second, given.plot)
    except (OSError, ValueError) as error:  # matplotlib refuses an unknown ending with a ValueError
        print(f"load: cannot write: {error}", file=sys.stderr)
        return 1
    return 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `load`, but for those of the connection."""
    add = parser.add_argument
    arrivals = parser.add_mutually_exclusive_group(required=True)
    arrivals.add_argument("--rate", type=_number(0, above=True), metavar="X", help="requests a second, at random times")
    arrivals.add_argument("--trace", type=Path, metavar="FILE", help="arrivals from a file; JSON lines, or Azure's CSV")
    add("--burstiness", type=_number(0), default=1.0, metavar="CV",
        help="coefficient of variation of the gaps: 1 is a Poisson process, 0 even, 3 bursts")  # fmt: skip
    add("--speed", type=_number(0, above=True), default=1.0, metavar="X", help="play the trace X times as fast")
    add("--duration", type=_number(0, above=True), metavar="SECONDS", help="of arrivals; default 30 with --rate")
    add("--requests", type=_whole, metavar="N", help="stop after so many")
    add("--warmup", type=_number(0), default=0.0, metavar="SECONDS", help="send but do not count at first")
    add("--prompts", type=Path, metavar="FILE", help="JSON lines with prompt or messages, and weight if wished")
    add("--prompt-tokens", type=_mix, metavar="MIX", help="cut prompts to lengths, such as 64:5,256-512:3,1500:1")
    add("--max-tokens", dest="lengths", type=_mix, default="128", metavar="MIX", help="likewise; default %(default)s")
    add("--cancel", type=_number(0, 1), default=0.0, metavar="SHARE", help="of streams to hang up on part-way")
    add("--cold", action="store_true", help="no request finds another's prompt in the prefix cache")
    add("--seed", dest="workload_seed", type=int, default=0, metavar="N", help="of arrivals, mixes and hang-ups")
    add("--ttft-goal", type=_number(0, above=True), metavar="SECONDS", help="count who had a first token in time")
    add("--tpot-goal", type=_number(0, above=True), metavar="SECONDS", help="… and who had the others so fast")
    add("--temperature", type=float, metavar="X")
    add("--top-p", type=float, metavar="X")
    add("--ignore-eos", action="store_true", help="go on past the model's end token: every reply has its full length")
    add("--speculation", choices=("off", "fixed", "threshold", "auto"))
    add("--draft-tokens", type=_whole, metavar="N")
    add("--verification", choices=("rejection", "coupled"))
    add("--priority", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--plot", type=Path, metavar="FILE.png", help="draw the run (needs matplotlib)")
    add("--samples", type=Path, metavar="FILE", help="write every request's times, a JSON object a line")


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Any:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            limits = f"above {low:g}" if above else f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    return number


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _mix(text: str) -> Any:
    try:
        return parse_mix(text)
    except WorkloadError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
