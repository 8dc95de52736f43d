"""Coupled verification: one seed, one text, whatever runs beside it and however it is drafted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.config import PAGE_SIZE, EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.types import EndConditions, Request, Sampling, Speculation, SpeculationMode
from tests.lossless.arms import COSTS, VOCAB, target

TOKENS = 20  # a text's length
OFF = Speculation(SpeculationMode.OFF)
FIXED = Speculation(SpeculationMode.FIXED)
THRESHOLD = Speculation(SpeculationMode.THRESHOLD, confidence_threshold=0.4)


@dataclass(frozen=True)
class Agreement:
    """How many seeds gave the text that plain decoding gives."""

    name: str
    seeds: int
    same: int
    witnessed: int  # preemptions, or prompts found in the prefix cache, or drafted tokens kept: that it happened
    witness: str

    @property
    def passed(self) -> bool:
        return self.same == self.seeds and (self.witnessed > 0 or not self.witness)


def load(drafter: str = "random", **options: Any) -> Engine:
    """The tiny target and a drafter with random weights, one of `arms.REAL`; DSpark by default."""
    directory, _ = target()
    settings: dict[str, Any] = {"kv_memory": 2**20, "max_running": 32, "prefill_chunk": 64, "prefix_cache": False}
    return load_engine(
        EngineConfig(model=str(directory / "target"), draft=str(directory / drafter), **{**settings, **options})
    )


def prompt_of(seed: int) -> tuple[int, ...]:
    """Prompts of 1 to 35 tokens; the long ones share their first two pages with each other."""
    length = 1 + seed * 5 % 35
    start = [(index * index + index // 3) % VOCAB for index in range(length - 1)]
    return (*start, seed % VOCAB)


def requests(count: int, speculation: Speculation) -> list[Request]:
    """One request a seed; sampling options vary with the seed."""
    options = (Sampling(), Sampling(temperature=0.7), Sampling(top_p=0.9), Sampling(repetition_penalty=1.2, top_k=6))
    return [
        Request(
            str(seed),
            prompt_of(seed),
            EndConditions(TOKENS),
            replace(options[seed % len(options)], seed=seed),
            speculation,
        )
        for seed in range(count)
    ]


@dataclass
class Run:
    """Texts by request id, and what was seen on the way."""

    texts: dict[str, list[int]]
    accepted: int = 0
    preempted: int = 0
    hits: int = 0


def play(served: Engine, todo: list[Request], at_once: int = 32) -> Run:
    """Serve everything, at most `at_once` in flight."""
    run = Run({request.request_id: [] for request in todo})
    waiting, flying = list(reversed(todo)), 0
    preempted: set[str] = set()
    while waiting or flying:
        while waiting and flying < at_once:
            served.submit(waiting.pop())
            flying += 1
        for delta in served.step():
            run.texts[delta.request_id] += delta.tokens
            run.accepted += delta.accepted
            run.hits += bool(delta.cached_tokens)
            flying -= delta.finish is not None
        preempted |= {s.request.request_id for s in served.waiting if s.preemptions}
        served.check()
    run.preempted = len(preempted)
    return run


def agreement(seeds: int, drafter: str = "random") -> list[Agreement]:
    """Plain decoding of every seed against all other ways to serve it."""
    plain = play(load(), requests(seeds, OFF))

    def compare(name: str, run: Run, witnessed: int = 0, witness: str = "") -> Agreement:
        name = name if drafter == "random" else f"{drafter}: {name}"
        same = sum(run.texts[seed] == text for seed, text in plain.texts.items())
        return Agreement(name, seeds, same, witnessed, witness)

    found = [compare("plain, alone", play(load(drafter), requests(seeds, OFF), at_once=1))]
    for name, speculation in (("fixed", FIXED), ("threshold", THRESHOLD)):
        run = play(load(drafter), requests(seeds, speculation))
        found.append(compare(f"{name}, among 31 others", run, run.accepted, "drafted tokens kept"))
    for policy in ("fixed", "threshold", "causal", "relayed", "auto"):
        served = load(drafter, policy=policy)
        served.scheduler.use(COSTS)
        run = play(served, requests(seeds, Speculation()))
        found.append(compare(f"policy {policy}, among 31 others", run, run.accepted, "drafted tokens kept"))
    run = play(load(drafter), requests(seeds, FIXED), at_once=1)
    found.append(compare("fixed, alone", run, run.accepted, "drafted tokens kept"))
    small = load(drafter, kv_memory=14 * _page_bytes(drafter), max_model_len=4 * PAGE_SIZE)
    run = play(small, requests(seeds, FIXED))
    found.append(compare("fixed, preempted", run, run.preempted, "texts preempted"))
    cached = load(drafter, prefix_cache=True)
    play(cached, requests(min(seeds, 64), FIXED))
    run = play(cached, requests(seeds, THRESHOLD))
    found.append(compare("threshold, prefix cache", run, run.hits, "prefix hits"))
    return found


def _page_bytes(drafter: str = "random") -> int:
    """What one page of target and drafter caches takes."""
    served = load(drafter)
    assert served.drafter is not None
    geometry = served.target.geometry
    return 2 * geometry.layers * geometry.kv_width * PAGE_SIZE * 4 + served.drafter.page_bytes
