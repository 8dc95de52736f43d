"""Real speculative decoding of held-out prompts in a plain loop: accepted lengths by domain.

python -m engine.training.evaluate --target DIR --draft DIR --prompts FILE
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from engine.training.dspark import DraftConfig, DSpark
from engine.training.export import read_target
from engine.training.generate import Cache, extend
from engine.training.model import Qwen3


def read_drafter(folder: Path, target: Qwen3) -> DSpark:
    """The drafter of a target from its public files, in fp32."""
    raw = json.loads((folder / "config.json").read_text())
    config = DraftConfig(
        target.config,
        raw["num_hidden_layers"],
        raw["block_size"],
        tuple(raw["target_layer_ids"]),
        raw["mask_token_id"],
        raw["markov_rank"],
        raw["num_anchors"],
    )
    model = DSpark(config)
    tensors = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.requires_grad_(False).eval()


def law(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities [..., V] at a temperature; a point mass at zero."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.softmax(logits / temperature, -1)


@dataclass
class Outcome:
    """Tokens after the prompt, decode rounds, and accepted counts by slot."""

    tokens: list[int]
    rounds: int
    accepted: list[int]


@torch.inference_mode()
def decode(target: Qwen3, drafter: DSpark, prompt: list[int], count: int, temperature: float) -> Outcome:
    """Draft γ tokens, verify them all, keep the accepted ones and one more; repeat."""
    block, taps = drafter.config.block_size, drafter.config.target_layer_ids
    table = target.model.embed_tokens.weight
    cache = Cache(target, 1, len(prompt) + count + block + 2)
    logits, features = extend(target, cache, torch.tensor([prompt]), taps)
    out = Outcome([int(torch.multinomial(law(logits[0, -1], temperature), 1))], 0, [0] * block)
    while len(out.tokens) < count and out.tokens[-1] != 0:
        anchor, place = out.tokens[-1], torch.tensor([[cache.size]])
        hidden = drafter.hidden(features, place, torch.tensor([[anchor]]), table)[0, 0]
        drafted, laws = [anchor], []
        for slot in range(block):
            scores, _ = drafter.heads(hidden[slot], torch.tensor(drafted[-1]), table)
            laws.append(law(scores, temperature))
            drafted.append(int(torch.multinomial(laws[-1], 1)))
        begin = cache.size
        logits, fresh = extend(target, cache, torch.tensor([drafted]), taps)
        wanted = law(logits[0], temperature)
        kept = 0
        for slot in range(block):
            token = drafted[slot + 1]
            if float(torch.rand(())) * laws[slot][token] >= wanted[slot, token]:
                break
            kept += 1
            out.accepted[slot] += 1
        rest = wanted[kept] if kept == block else (wanted[kept] - laws[kept]).clamp_min(0)
        out.tokens += [*drafted[1 : kept + 1], int(torch.multinomial(rest, 1))]
        cache.size = begin + kept + 1
        features = torch.cat((features, fresh[:, : kept + 1]), 1)
        out.rounds += 1
    return out


def repeated(tokens: list[int], size: int = 16) -> float:
    """Share of the n-grams of this size that occurred earlier in the same tokens."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    """Print one JSON line a domain and temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("target", "draft", "prompts"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--limit", type=int, default=16, help="prompts a domain")
    args = parser.parse_args()
    torch.manual_seed(3)
    target = read_target(args.target)
    drafter = read_drafter(args.draft, target)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    for domain in ("code", "prose", "arithmetic"):
        prompts = [r["prompt"] for r in rows if r["domain"] == domain][: args.limit]
        for temperature in (0.0, 1.0):
            done = [decode(target, drafter, tokenizer.encode(p).ids, args.count, temperature) for p in prompts]
            rounds = sum(o.rounds for o in done)
            counts = [sum(o.accepted[k] for o in done) for k in range(drafter.config.block_size)]
            before = [rounds, *counts[:-1]]
            share = [round(a / max(1, b), 3) for a, b in zip(counts, before, strict=True)]
            row: dict[str, Any] = {"domain": domain, "temperature": temperature, "rounds": rounds}
            length = sum(len(o.tokens) - 1 for o in done) / max(1, rounds)
            grams = sum(repeated(o.tokens) for o in done) / len(done)
            row |= {"mean_accepted_length": round(length, 3), "repeated_16grams": round(grams, 3)}
            print(json.dumps({**row, "acceptance_by_position": share}), flush=True)


if __name__ == "__main__":
    main()
