"""Row invariance: the logits of a prefix have the same bits whatever ran beside it and however it came there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from engine.engine import Engine
from engine.types import Batch, DraftBlock, Request, StepPlan, Verdict
from tests.lossless.coupled import FIXED, OFF, _page_bytes, load, play, requests


class Recorder:
    """Watches an engine's target: bits of the logits by the whole token prefix that they follow."""

    def __init__(self, served: Engine) -> None:
        self.bits: dict[tuple[int, ...], bytes] = {}
        self.conflicts = 0
        self._prefixes: list[tuple[int, ...]] = []
        verifier = served.verifier
        run, forward = verifier.run, served.target.forward

        def watched_run(plan: StepPlan, block: DraftBlock | None) -> Verdict:
            self._prefixes = list(_prefixes(plan, block))
            return run(plan, block)

        def watched_forward(batch: Batch, capture: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits, features = forward(batch, capture)
            for prefix, row in zip(self._prefixes, logits, strict=True):
                seen = row.numpy().tobytes()
                self.conflicts += self.bits.setdefault(prefix, seen) != seen
            return logits, features

        verifier.run = watched_run  # type: ignore[method-assign]
        served.target.forward = watched_forward  # type: ignore[method-assign]


def _prefixes(plan: StepPlan, block: DraftBlock | None) -> Iterable[tuple[int, ...]]:
    """What each row of logits follows, in the batch's order."""
    drafts = {id(s): row for s, row in zip(block.sequences, block.tokens.tolist(), strict=True)} if block else {}
    for row in plan.rows:
        if row.needs_token:
            known = tuple(row.sequence.tokens[: row.start + row.count - row.draft_length])
            for length in range(row.draft_length + 1):
                yield known + tuple(drafts.get(id(row.sequence), [])[:length])


@dataclass(frozen=True)
class Invariance:
    """Prefixes met in the condition and in the baseline, and how many had other bits."""

    name: str
    compared: int
    different: int

    @property
    def passed(self) -> bool:
        return self.compared > 0 and self.different == 0


def invariance(seeds: int) -> list[Invariance]:
    """The same texts alone, in batches, in small chunks, from the prefix cache and after preemption."""
    baseline = _record({}, requests(seeds, OFF), 1)
    conditions: list[tuple[str, dict[str, Any], list[Request], int]] = [
        (f"{count} at once", {}, requests(seeds, OFF), count) for count in (2, 3, 8, 32)
    ]
    conditions += [
        ("drafted, alone", {}, requests(seeds, FIXED), 1),
        ("drafted, 32 at once", {}, requests(seeds, FIXED), 32),
        ("chunks of 5", {"prefill_chunk": 5, "max_batch_tokens": 37}, requests(seeds, FIXED), 32),
        (
            "chunks of 2",
            {"max_batch_tokens": 2, "prefill_chunk": 1, "max_running": 1},
            requests(min(seeds, 32), OFF),
            1,
        ),
        ("prefix cache", {"prefix_cache": True}, requests(seeds, FIXED), 32),
        ("preempted", {"kv_memory": 14 * _page_bytes(), "max_model_len": 64}, requests(seeds, FIXED), 32),
    ]
    found = []
    for name, options, todo, at_once in conditions:
        recorder = _record(options, todo, at_once)
        shared = recorder.bits.keys() & baseline.bits.keys()
        different = sum(recorder.bits[prefix] != baseline.bits[prefix] for prefix in shared)
        found.append(Invariance(name, len(shared), different + recorder.conflicts))
    return found


def _record(options: dict[str, Any], todo: list[Request], at_once: int) -> Recorder:
    served = load(**options)
    recorder = Recorder(served)
    play(served, todo, at_once)
    return recorder
