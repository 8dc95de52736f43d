"""Rounds whose every candidate was verified tell what any schedule would have accepted: replayed, and bounded.

A schedule that knows which drafted tokens will be accepted (clairvoyant) verifies exactly those, and drafts only where
some are. What it gains over plain decoding on the same rounds is the most that scheduling can gain there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.schedule.acceptance import Block, Trace
from engine.schedule.cost import CostTable, Work

Record = Mapping[str, Any]  # RoundRecord.as_dict


def traces(records: Iterable[Record], least: int = 4) -> list[Trace]:
    """Every request's blocks, of those that have `least`; a block cut short by the request's end is left out."""
    found: dict[str, list[Block]] = {}
    for record in records:
        for request in record["requests"]:
            survival, verified = request["survival"], request["verified"]
            if survival and verified == len(survival) and request["sitting"] != "lookup":
                found.setdefault(request["request_id"], []).append(Block(tuple(survival), request["accepted"]))
    longest = max((len(b.survival) for blocks in found.values() for b in blocks), default=0)
    whole = ([b for b in blocks if len(b.survival) == longest] for blocks in found.values())
    return [Trace(tuple(blocks)) for blocks in whole if len(blocks) >= least]


@dataclass(frozen=True, slots=True)
class Bound:
    """Tokens a second on the same rounds, by the cost table."""

    plain: float
    clairvoyant: float
    rounds: int

    @property
    def gain(self) -> float:
        """Clairvoyant ÷ plain."""
        return self.clairvoyant / self.plain if self.plain else 1.0


def clairvoyant(records: Iterable[Record], table: CostTable, plain: CostTable | None = None) -> Bound:
    """Bound what scheduling could gain on fully verified rounds without prompts in them.

    Maximises Σ tokens / Σ T by Dinkelbach's iteration: at a price, each round drafts for its best requests as far as
    that pays. Features of requests that sit out cost nothing here, so the bound is generous.

    Args:
        table: of the engine with the drafter.
        plain: of the engine without one; None takes `table`.
    """
    rounds = [_Known.of(record) for record in records if _fully_verified(record)]
    if not rounds:
        return Bound(0.0, 0.0, 0)
    tokens = sum(len(known.contexts) for known in rounds)
    base_s = sum(known.plain_s(plain or table) for known in rounds)
    best = rate = tokens / sum(known.plain_s(table) for known in rounds)
    for _ in range(20):
        sums = np.sum([known.best(table, best) for known in rounds], axis=0)
        reached = float(sums[0] / sums[1])
        if reached <= best * (1 + 1e-6):
            break
        best = reached
    return Bound(tokens / base_s, max(best, rate), len(rounds))


def _fully_verified(record: Record) -> bool:
    requests = record["requests"]
    return (
        bool(requests)
        and not record["prefill_rows"]
        and all(r["survival"] and r["verified"] == len(r["survival"]) for r in requests)
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """A round of which everything is known; requests by decreasing accepted tokens."""

    contexts: Row[int]
    accepted: Row[int]

    @classmethod
    def of(cls, record: Record) -> _Known:
        requests = sorted(record["requests"], key=lambda r: -r["accepted"])
        return cls([r["context"] for r in requests], [r["accepted"] for r in requests])

    def plain_s(self, table: CostTable) -> float:
        count = len(self.contexts)
        return table.seconds(Work(requests=count, rows=count, context=sum(self.contexts)))

    def best(self, table: CostTable, price: float) -> tuple[float, float]:
        """(tokens, seconds) of the most profitable number of drafting requests at this price."""
        count, context = len(self.contexts), sum(self.contexts)
        gained = row_context = draft_context = 0
        choice = float(count), self.plain_s(table)
        for drafting, (length, own) in enumerate(zip(self.accepted, self.contexts, strict=True), start=1):
            if not length:
                break
            gained, draft_context, row_context = gained + length, draft_context + own, row_context + length * own
            work = Work(count, count + gained, context, row_context, 0, drafting, draft_context, gained + drafting)
            seconds = table.seconds(work)
            if count + gained - price * seconds > choice[0] - price * choice[1]:
                choice = float(count + gained), seconds
        return choice
