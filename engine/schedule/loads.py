"""Requests over time, for simulations."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the replayed load."""

    at_s: float
    prompt: int  # tokens
    tokens: int  # to generate
    acceptance: int = 0  # which of the profiles it follows
    priority: int = 0


def closed_load(concurrency: int, requests: int, tokens: int, kinds: int = 1, seed: int = 0) -> list[Arrival]:
    """`requests` requests that all wait from the start: with `max_running` = concurrency, as many always run."""
    generator = random.Random(seed)
    return [Arrival(0.0, 64, tokens, generator.randrange(kinds)) for _ in range(max(requests, concurrency))]


def poisson_load(rate: float, seconds: float, tokens: int, kinds: int = 1, seed: int = 0) -> list[Arrival]:
    """Requests at random times, `rate` a second on average."""
    generator = random.Random(seed)
    found, now = [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        found.append(Arrival(now, 64, tokens, generator.randrange(kinds)))
    return found
