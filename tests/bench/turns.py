"""`python -m tests.bench.turns`: engines in one process take turns under a closed load, a fifth of a second each.

A shared machine's moods fall on all of them alike, so that differences of 2 % are seen, which `bench-load` through
servers cannot see. One JSON line per (arm, concurrency): tokens/s of decode rounds, and their ratio to the first arm's
with a 95 % bootstrap interval over turns drawn together. The last arm is another engine like the first: its ratio is
what the method itself lets differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import time
from collections.abc import Sequence

import numpy as np

from engine.config import POLICIES
from engine.engine import Engine
from engine.types import EndConditions, Request, Sampling
from server.collector import pass_over_what_stays
from tests.bench.decoding import make_engine
from tests.bench.load import TURN_S, concurrencies, seconds
from tests.bench.load_client import Job, mixed_jobs
from tests.bench.measure import EMBEDDED, emit, say

WARM_S = 1.0
ARMS = ("plain", "auto", "alone")  # `alone`: auto without prompt lookup
FIXED = re.compile(r"fixed-([1-7])")  # of the embedded drafter's block
RESAMPLES = 2000


class Users:
    """So many users of one engine, each with one request at a time; between turns everything stands still."""

    def __init__(self, engine: Engine, prompts: Sequence[list[int]], jobs: Sequence[Job], count: int, t: float) -> None:
        self.engine = engine
        self._prompts, self._jobs, self._count, self._temperature = prompts, jobs, count, t
        self._numbers = itertools.count()

    def turn(self, seconds: float) -> float:
        """Tokens/s of a turn."""
        engine, tokens, start = self.engine, 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            while len(engine.running) + len(engine.waiting) < self._count:
                engine.submit(self._request(next(self._numbers)))
            tokens += sum(len(delta.tokens) for delta in engine.step() if delta.decode_round)
        return tokens / passed

    def leave(self) -> None:
        for sequence in [*self.engine.running, *self.engine.waiting]:
            self.engine.cancel(sequence.request.request_id)

    def _request(self, number: int) -> Request:
        place = number % len(self._jobs)
        end, sampling = EndConditions(self._jobs[place].tokens), Sampling(temperature=self._temperature)
        return Request(str(number), tuple(self._prompts[place]), end, sampling)


def ratio(speeds: Sequence[float], first: Sequence[float]) -> tuple[float, float, float]:
    """Mean speed ÷ the first arm's, and the 95 % interval; turns are drawn together, as they were taken."""
    mine, theirs = np.array(speeds), np.array(first)
    drawn = np.random.default_rng(0).integers(len(mine), size=(RESAMPLES, len(mine)))
    low, high = np.quantile(mine[drawn].sum(1) / theirs[drawn].sum(1), (0.025, 0.975))
    return float(mine.sum() / theirs.sum()), float(low), float(high)


def main() -> None:
    given = parser().parse_args()
    _compare(given.arms, given.concurrency, given.temperature, given.seconds, given.threads, given.prefix_cache)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(prog="python -m tests.bench.turns", description=__doc__)
    add = made.add_argument
    told = f"default {','.join(ARMS)}; policies, fixed-N, and alone"
    add("--arms", type=_arms, default=ARMS, metavar="NAME,…", help=told)
    add("--concurrency", type=concurrencies, default=(1, 2, 4, 8, 16, 32, 64), metavar="N,…")
    add("--temperature", type=float, default=1.0)
    add("--seconds", type=seconds, default=15.0, help="of each arm at each concurrency (default %(default)g)")
    add("--prefix-cache", action="store_true", help="as servers have it; prompts come again")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return made


def _arms(text: str) -> tuple[str, ...]:
    known, named = (*POLICIES, "alone"), tuple(text.split(","))
    if wrong := [name for name in named if name not in known and not FIXED.fullmatch(name)]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(known)}, fixed-N")
    return named


def _engine(name: str, threads: int, prefix_cache: bool) -> Engine:
    """`fixed-3` drafts so many tokens for everybody."""
    fixed = FIXED.fullmatch(name)
    engine = make_engine("fixed" if fixed else name, threads, prefix_cache=prefix_cache)
    if fixed:
        engine.update_policy({"draft_tokens": int(fixed[1])})
    return engine


def _compare(
    arms: Sequence[str], levels: Sequence[int], temperature: float, seconds: float, threads: int, prefix_cache: bool
) -> None:
    jobs = mixed_jobs(EMBEDDED)
    prompts = EMBEDDED.encode([job.prompt for job in jobs])
    names = [*arms, f"{arms[0]} again"]
    engines = {name: _engine(name.split(" ")[0], threads, prefix_cache) for name in names}
    pass_over_what_stays()
    for concurrency in levels:
        users = {n: Users(e, prompts, jobs, concurrency, temperature) for n, e in engines.items()}
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            users[name].turn(WARM_S)
        for turn in range(round(seconds / TURN_S)):
            for name in random.Random(turn).sample(names, len(names)):
                speeds[name].append(users[name].turn(TURN_S))
        for user in users.values():
            user.leave()
        found = {name: ratio(speeds[name], speeds[names[0]]) for name in names[1:]}
        say(
            f"{concurrency} at once: "
            + ", ".join(f"{n} {r:.3f} ({a:.3f} to {b:.3f})" for n, (r, a, b) in found.items())
        )
        for name in names:
            own, low, high = found.get(name, (1.0, 1.0, 1.0))
            speed = float(np.mean(speeds[name]))
            emit(
                arm=name,
                concurrency=concurrency,
                tokens_per_s=speed,
                ratio=own,
                interval=(round(low, 4), round(high, 4)),
            )


if __name__ == "__main__":
    main()
