"""When requests arrive, and which: a plan made before the first one is sent, the same for the same seed."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from clients.events import Prompt
from clients.load.prompts import LengthMix, PromptMix, WorkloadError, json_lines, prompt_of, read_text

_CSV = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")  # the Azure LLM inference traces' columns


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the plan.

    Attributes:
        at_s: seconds after the start.
        cancel_after_tokens: hang up once so many tokens are there; None: read to the end.
    """

    at_s: float
    prompt: Prompt
    max_tokens: int
    cancel_after_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """What a trace says about one request; None leaves it to the mixes."""

    at_s: float
    prompt: Prompt | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    cancel_after_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixes:
    """What requests are drawn from.

    Attributes:
        prompt_tokens: None: whole prompts, however long they are.
        cancel_share: of requests, hung up on after a random part of their tokens.
    """

    prompts: PromptMix
    prompt_tokens: LengthMix | None
    max_tokens: LengthMix
    cancel_share: float = 0.0


def random_times(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Arrival times without end: gaps independent, Gamma distributed, of mean 1/rate s.

    Args:
        burstiness: the gaps' coefficient of variation. 1: a Poisson process; 0: evenly spaced; above 1: bursts.
    """
    rng, now = random.Random(f"{seed} arrivals"), 0.0
    while True:
        if burstiness:
            shape = burstiness**-2
            now += rng.gammavariate(shape, 1 / (shape * rate))
        else:
            now += 1 / rate
        yield now


def read_trace(path: Path) -> list[TraceEntry]:
    """A trace in order of time, the first request at 0 s.

    JSON lines: `at_s`, and if wished `prompt`, `messages` or `prompt_tokens`, `max_tokens`, `cancel_after_tokens`. A
    file that ends with .csv has the columns TIMESTAMP, ContextTokens and GeneratedTokens, as Azure's LLM traces.

    Raises:
        WorkloadError: the file cannot be read, or a line is something else.
    """
    read = _csv_entries if path.suffix.lower() == ".csv" else _json_entries
    entries = sorted(read(path), key=lambda entry: entry.at_s)
    if not entries:
        raise WorkloadError(f"{path}: no requests in it")
    start = entries[0].at_s
    return [TraceEntry(e.at_s - start, e.prompt, e.prompt_tokens, e.max_tokens, e.cancel_after_tokens) for e in entries]


def _json_entries(path: Path) -> Iterator[TraceEntry]:
    for place, entry in json_lines(path):
        at_s = entry.get("at_s")
        if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not math.isfinite(at_s):
            raise WorkloadError(f"{place}: at_s: must be the arrival's time in seconds, not {at_s!r}")
        asks = "prompt" in entry or "messages" in entry
        if asks and "prompt_tokens" in entry:
            raise WorkloadError(f"{place}: prompt_tokens: not together with a prompt")
        yield TraceEntry(
            float(at_s),
            prompt_of(entry, place) if asks else None,
            _count(entry, "prompt_tokens", place),
            _count(entry, "max_tokens", place),
            _count(entry, "cancel_after_tokens", place),
        )


def _csv_entries(path: Path) -> Iterator[TraceEntry]:
    rows = csv.DictReader(io.StringIO(read_text(path)))
    if not set(_CSV) <= set(rows.fieldnames or ()):
        raise WorkloadError(f"{path}:1: needs the columns {', '.join(_CSV)}")
    for row in rows:
        place = f"{path}:{rows.line_num}"
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            counts: dict[str, Any] = {name: int(row[name]) for name in _CSV[1:]}
        except (TypeError, ValueError) as error:
            raise WorkloadError(f"{place}: {error}") from None
        counts = {name: count or 1 for name, count in counts.items()}  # recorded requests that gave nothing were sent
        yield TraceEntry(
            at_s,
            prompt_tokens=_count(counts, "ContextTokens", place),
            max_tokens=_count(counts, "GeneratedTokens", place),
        )


def _count(entry: dict[str, Any], name: str, place: str) -> int | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**32:
        raise WorkloadError(f"{place}: {name}: must be a whole number, at least 1, not {value!r}")
    return value


def make_plan(entries: Sequence[TraceEntry], mixes: Mixes, seed: int) -> list[Arrival]:
    """Fills in from the mixes what the entries leave open.

    Every choice has random numbers of its own, so that another mix of lengths, say, changes neither the prompts nor who
    hangs up.
    """
    whole, lengths, ends, hanging_up = (
        random.Random(f"{seed} {purpose}") for purpose in ("prompts", "prompt tokens", "max tokens", "cancel")
    )
    plan = []
    for entry in entries:
        prompt = entry.prompt
        drawn = mixes.prompt_tokens.draw(lengths) if mixes.prompt_tokens else None
        length = entry.prompt_tokens or drawn
        if prompt is None:
            prompt = mixes.prompts.draw(whole) if length is None else mixes.prompts.draw_tokens(whole, length)
        max_tokens, part = mixes.max_tokens.draw(ends), hanging_up.random()
        hangs_up = hanging_up.random() < mixes.cancel_share
        if entry.max_tokens is not None:
            max_tokens = entry.max_tokens
        cancel_after = entry.cancel_after_tokens
        if cancel_after is None and hangs_up:
            cancel_after = 1 + int(part * max(max_tokens - 1, 1))  # before the last one, where there are several
        plan.append(Arrival(entry.at_s, prompt, max_tokens, cancel_after))
    return plan
