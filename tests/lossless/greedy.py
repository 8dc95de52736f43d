"""Greedy decoding of the embedded model against transformers' own, token for token, on held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine
from engine.config import EngineConfig
from engine.loading import load_engine
from engine.types import EndConditions, Request, Sampling
from tests.lossless.coupled import play

DEMO = Path(engine.__file__).parent / "demo"


@dataclass(frozen=True)
class Difference:
    """Where a text first left transformers' path, and how far apart the two logits were there."""

    prompt: int
    position: int
    gap: float


@dataclass(frozen=True)
class Greedy:
    """Exact texts among all, and each difference."""

    name: str
    texts: int
    tokens: int
    exact: int
    accepted: int
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """A different token is forgiven only where rounding decides: the logits tie within 1e-4."""
        return self.texts > 0 and all(difference.gap < 1e-4 for difference in self.differences)


def available() -> bool:
    """Whether the embedded model and its held-out prompts are there."""
    files = ("prompts/heldout.jsonl", "target/model.safetensors", "dspark/model.safetensors", "dspark/config.json")
    return all((DEMO / name).exists() for name in files)


def greedy(count: int, tokens: int) -> list[Greedy]:
    """Plain and drafted greedy texts of `count` held-out prompts."""
    prompts = _prompts(count)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).eval()
    reference = {str(i): _generate(model, prompt, tokens) for i, prompt in enumerate(prompts)}
    found = []
    for name, draft in (("plain", "none"), ("dspark", str(DEMO / "dspark"))):
        config = EngineConfig(model=str(DEMO / "target"), draft=draft, kv_memory=64 * 2**20, policy="fixed")
        todo = [
            Request(str(i), prompt, EndConditions(tokens), Sampling(temperature=0.0))
            for i, prompt in enumerate(prompts)
        ]
        run = play(load_engine(config), todo, at_once=8)
        differences = [
            _first_difference(model, i, prompt, run.texts[str(i)], reference[str(i)])
            for i, prompt in enumerate(prompts)
            if run.texts[str(i)] != reference[str(i)]
        ]
        total = sum(len(text) for text in run.texts.values())
        exact = len(prompts) - len(differences)
        found.append(Greedy(name, len(prompts), total, exact, run.accepted, tuple(differences)))
    return found


def _prompts(count: int) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
    lines = (DEMO / "prompts" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = []
    for line in lines[:count]:
        record = json.loads(line)
        text = record["prompt"] if "prompt" in record else record["text"]
        prompts.append(tuple(tokenizer(text)["input_ids"]))
    return prompts


def _generate(model: torch.nn.Module, prompt: tuple[int, ...], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def _first_difference(
    model: torch.nn.Module, index: int, prompt: tuple[int, ...], ours: list[int], theirs: list[int]
) -> Difference:
    position = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ours[:position]]])).logits[0, -1]
    return Difference(index, position, abs(float(logits[ours[position]] - logits[theirs[position]])))
