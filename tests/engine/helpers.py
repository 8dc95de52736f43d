"""Running an engine in tests: every round is followed by `check()`, and everything must be free at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.types import (
    DraftBlock,
    EndConditions,
    FinishReason,
    Request,
    Sampling,
    Sequence,
    Speculation,
    SpeculationMode,
    StepPlan,
    TokenDelta,
    TokenLogprob,
    Verdict,
    Verification,
)

OFF = Speculation(SpeculationMode.OFF)
FIXED = Speculation(SpeculationMode.FIXED)
THRESHOLD = Speculation(SpeculationMode.THRESHOLD)
PAGE_BYTES = 49_152  # one page of the default tiny target (4 layers) and drafter (2 layers)
GREEDY = Sampling(temperature=0.0)


@dataclass
class Result:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached: int | None = None

    @property
    def drafted_tokens_kept(self) -> int:
        return sum(delta.accepted for delta in self.deltas)


def load(target: Path, draft: Path | None = None, **options: Any) -> Engine:
    """An engine on a small page pool, unless told otherwise."""
    options.setdefault("kv_memory", 4 * 2**20)
    options.setdefault("max_model_len", 256)
    return load_engine(EngineConfig(model=str(target), draft="none" if draft is None else str(draft), **options))


def request(
    name: str,
    prompt: Iterable[int],
    tokens: int = 24,
    sampling: Sampling = GREEDY,
    speculation: Speculation | None = None,
    **more: Any,
) -> Request:
    """A request; `more` may hold min_tokens, stop_ids and any field of Request."""
    end = EndConditions(tokens, more.pop("min_tokens", 0), frozenset(more.pop("stop_ids", ())))
    return Request(name, tuple(prompt), end, sampling, speculation or Speculation(), **more)


def collect(results: dict[str, Result], deltas: Iterable[TokenDelta]) -> None:
    """Sort a round's messages to their requests."""
    for delta in deltas:
        result = results.setdefault(delta.request_id, Result())
        assert result.finish is None, f"{delta.request_id} heard more after its end"
        result.deltas.append(delta)
        result.tokens += delta.tokens
        result.logprobs += delta.logprobs
        result.finish = delta.finish
        if delta.cached_tokens is not None:
            result.cached = delta.cached_tokens


def run(engine: Engine, requests: Iterable[Request], limit: int = 10_000) -> dict[str, Result]:
    """Submit everything, step until idle, proving the pages after every round."""
    results: dict[str, Result] = {}
    for one in requests:
        results[one.request_id] = Result()
        engine.submit(one)
    for _ in range(limit):
        if not engine.has_work:
            break
        collect(results, engine.step())
        engine.check()
    assert not engine.has_work, "the engine did not finish"
    assert engine.pool.available == engine.pool.total, "pages are still held when idle"
    return results


def text(engine: Engine, one: Request) -> list[int]:
    """The tokens of one request, alone."""
    return run(engine, [one])[one.request_id].tokens


def coupled(seed: int, temperature: float = 1.0, **more: Any) -> Sampling:
    """Seeded sampling, verified by coupling unless the request says otherwise."""
    return Sampling(temperature=temperature, seed=seed, **more)


def rejection(mode: SpeculationMode = SpeculationMode.FIXED, **more: Any) -> Speculation:
    return Speculation(mode, verification=Verification.REJECTION, **more)


class ScriptDrafter:
    """Proposes the next γ tokens of a known text, so that a test decides what is accepted.

    Args:
        scripts: the expected output by prompt; past its end token 0 is proposed.
    """

    kind = "script"
    head = "none"
    has_confidence = False
    lookahead = 0
    page_bytes = 0
    feature_layers: tuple[int, ...] = (0,)

    def __init__(self, scripts: dict[tuple[int, ...], list[int]], block: int = 5) -> None:
        self.scripts = scripts
        self.block_size = block

    def allocate(self, pages: int) -> None:
        pass

    def propose(self, sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        tokens = []
        for sequence in sequences:
            assert sequence.absorbed == sequence.kv_length
            rest = self.scripts[sequence.request.prompt][sequence.output_length :]
            tokens.append((rest + [0] * self.block_size)[: length or self.block_size])
        return DraftBlock(sequences, torch.tensor(tokens), None, None, None)

    def absorb(self, plan: StepPlan, verdict: Verdict, chosen: Iterable[int] | None = None) -> None:
        for index in range(len(plan.rows)) if chosen is None else chosen:
            row = plan.rows[index]
            assert row.sequence.absorbed == row.start
            row.sequence.absorbed = row.start + row.count - row.draft_length + verdict.accepted[index]


def scripted(target: Path, scripts: dict[tuple[int, ...], list[int]], block: int = 5, **options: Any) -> Engine:
    """An engine whose drafter follows scripts (greedy and coupled requests only)."""
    options.setdefault("policy", "fixed")
    loaded = load(target, **options)
    return Engine(loaded.config, loaded.target, ScriptDrafter(scripts, block), loaded.pool.total, loaded.info)


def generate(model: Any, prompt: Iterable[int], tokens: int, **options: Any) -> list[int]:
    """transformers' own greedy text."""
    ids = torch.tensor([list(prompt)])
    options = {"eos_token_id": None, "pad_token_id": 0, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options)
    return [int(token) for token in out[0, ids.shape[1] :]]


def watch_plans(engine: Engine) -> list[StepPlan]:
    """Every plan that the engine will run, in order."""
    plans: list[StepPlan] = []
    run = engine.verifier.run

    def watched(plan: StepPlan, block: DraftBlock | None) -> Verdict:
        plans.append(plan)
        return run(plan, block)

    engine.verifier.run = watched  # type: ignore[method-assign]
    return plans
