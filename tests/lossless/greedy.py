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
from tests.lossless.coupled import Run, play

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
    tie: float  # logits nearer than this are told apart by rounding alone

    @property
    def passed(self) -> bool:
        """A different token is forgiven only where rounding decides."""
        return self.texts > 0 and all(difference.gap < self.tie for difference in self.differences)


# float32 differs from transformers' own by the order of sums; bfloat16 factors carry 8 bits.
TIES = {"float32": 1e-4, "bfloat16": 0.1}


def available() -> bool:
    """Whether the embedded model and its held-out prompts are there."""
    files = ("prompts/heldout.jsonl", "target/model.safetensors", "dspark/model.safetensors", "dspark/config.json")
    return all((DEMO / name).exists() for name in files)


def greedy(count: int, tokens: int) -> list[Greedy]:
    """Plain and drafted greedy texts of `count` held-out prompts, against transformers in float32.

    In either dtype what is drafted must equal plain decoding in the same dtype to the last token.
    """
    prompts = _prompts(count)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).eval()
    reference = {str(i): _generate(model, prompt, tokens) for i, prompt in enumerate(prompts)}
    found = []
    for dtype, tie in TIES.items():
        plain = _texts(prompts, tokens, dtype, "none")
        drafted = _texts(prompts, tokens, dtype, str(DEMO / "dspark"))
        for name, run, wanted, near in (
            (f"plain {dtype}, transformers", plain, reference, tie),
            (f"dspark {dtype}, transformers", drafted, reference, tie),
            (f"dspark {dtype}, plain {dtype}", drafted, plain.texts, 0.0),
        ):
            differences = tuple(
                _first_difference(model, i, prompt, run.texts[str(i)], wanted[str(i)])
                for i, prompt in enumerate(prompts)
                if run.texts[str(i)] != wanted[str(i)]
            )
            total, exact = sum(map(len, run.texts.values())), len(prompts) - len(differences)
            found.append(Greedy(name, len(prompts), total, exact, run.accepted, differences, near))
    return found


def _texts(prompts: list[tuple[int, ...]], tokens: int, dtype: str, draft: str) -> Run:
    config = EngineConfig(
        model=str(DEMO / "target"), draft=draft, kv_memory=64 * 2**20, policy="fixed", dtype=dtype, prefix_cache=False
    )
    requests = [
        Request(str(i), prompt, EndConditions(tokens), Sampling(temperature=0.0)) for i, prompt in enumerate(prompts)
    ]
    return play(load_engine(config), requests, at_once=8)


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
