"""Interleaved timing, JSON lines, and what is measured when nothing else is named: the embedded model."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "engine" / "demo"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(**record: Any) -> None:
    """One JSON line on stdout."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    print(json.dumps(rounded), flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleave(arms: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every arm once a repeat, in alternating order, and collect what each returns."""
    results: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        names = list(arms) if repeat % 2 == 0 else list(reversed(arms))
        for name in names:
            results[name].append(arms[name]())
    return results


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def repeated_share(tokens: Sequence[int], width: int = 16) -> float:
    """Share of a text's `width`-grams that stood in it before: how much of it is a loop."""
    seen: set[tuple[int, ...]] = set()
    repeated = total = 0
    for start in range(len(tokens) - width + 1):
        gram = tuple(tokens[start : start + width])
        repeated += gram in seen
        seen.add(gram)
        total += 1
    return repeated / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a target, its drafters by name, and held-out prompts."""

    target: Path = DEMO / "target"
    drafters: Path = DEMO  # drafters, or the runs that `engine.training` made them in
    prompts: Path = DEMO / "prompts" / "heldout.jsonl"

    def drafter(self, name: str) -> Path | None:
        """Its directory; None where there is none."""
        places = (self.drafters / name, self.drafters / name / "drafter")
        return next((place for place in places if (place / "config.json").is_file()), None)

    def by_domain(self) -> dict[str, list[str]]:
        """Held-out prompts."""
        found: dict[str, list[str]] = {}
        for entry in map(json.loads, self.prompts.read_text(encoding="utf-8").splitlines()):
            found.setdefault(entry["domain"], []).append(entry["prompt"])
        return found

    def heldout(self, domain: str) -> list[str]:
        """Held-out prompts of one domain."""
        return self.by_domain()[domain]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts as the server reads them, the first one that the target's texts begin with included."""
        tokenizer = Tokenizer.from_file(str(self.target / "tokenizer.json"))
        return [tokenizer.encode(prompt).ids for prompt in prompts]


EMBEDDED = Subject()


def add_subject(parser: argparse._ActionsContainer) -> None:
    """Flags for another subject than the embedded model."""
    own = EMBEDDED
    parser.add_argument("--target", type=Path, default=own.target, metavar="DIR", help="default: the embedded model")
    parser.add_argument(
        "--drafters", type=Path, default=own.drafters, metavar="DIR", help="holds dspark, dflash, eagle3, mtp"
    )
    parser.add_argument("--prompts", type=Path, default=own.prompts, metavar="FILE", help="held-out ones, JSON lines")


def subject_of(given: argparse.Namespace) -> Subject:
    """What the flags name.

    Raises:
        SystemExit: it is not there; names the flag.
    """
    for flag, place in (("--target", given.target / "config.json"), ("--prompts", given.prompts)):
        if not place.is_file():
            raise SystemExit(f"{flag}: {place} is missing")
    if not given.drafters.is_dir():
        raise SystemExit(f"--drafters: {given.drafters} is no folder")
    return Subject(given.target.resolve(), given.drafters.resolve(), given.prompts.resolve())
