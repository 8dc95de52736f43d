"""Text sampled from the target itself, for training a drafter on what it will meet.

python -m engine.training.generate --target DIR --corpus DIR --out FILE --minutes 6
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.training.export import read_target
from engine.training.model import Attention, DecoderLayer, Qwen3, mix, rope_table


class Cache:
    """Keys and values of every layer for B rows of equal length."""

    def __init__(self, model: Qwen3, rows: int, length: int) -> None:
        c = model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, length, c.head_dim)
        self.k, self.v, self.size = torch.zeros(shape), torch.zeros(shape), 0


def extend(model: Qwen3, cache: Cache, tokens: Tensor, taps: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Append tokens [B, T]; returns (logits [B, T, V], tapped features [B, T, n·D])."""
    c, begin = model.config, cache.size
    end = begin + tokens.shape[1]
    rope = rope_table(torch.arange(begin, end), c.head_dim, c.rope_theta)
    mask = torch.arange(end) <= torch.arange(begin, end)[:, None]
    x = model.model.embed_tokens(tokens)
    kept = []
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        attention: Attention = layer.self_attn
        inner = layer.input_layernorm(x)
        k, v = attention.keys_values(inner, rope)
        cache.k[index, :, :, begin:end], cache.v[index, :, :, begin:end] = k, v
        q = attention.queries(inner, rope)
        mixed = mix(q, cache.k[index, :, :, :end], cache.v[index, :, :, :end], mask)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if index in taps:
            kept.append(x)
    cache.size = end
    return model.logits(model.model.norm(x)), torch.cat(kept, -1) if kept else x[..., :0]


def pick(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row from logits [B, V]; temperature [B], zero meaning the argmax."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    p = torch.softmax(logits / temperature.clamp_min(1e-4)[:, None], -1)
    return torch.where(temperature > 0, (p / noise).argmax(-1), logits.argmax(-1))


@torch.inference_mode()
def continue_text(model: Qwen3, prompts: Tensor, count: int, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """prompts [B, P] followed by `count` sampled tokens: [B, P + count]."""
    cache = Cache(model, len(prompts), prompts.shape[1] + count)
    logits, _ = extend(model, cache, prompts)
    out = [prompts]
    for _ in range(count):
        token = pick(logits[:, -1], temperature, generator)[:, None]
        out.append(token)
        logits, _ = extend(model, cache, token)
    return torch.cat(out, 1)


def main() -> None:
    """Write FILE, a uint16 array [N, P + count] of prompts from the corpus with continuations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    model = read_target(args.target)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    with np.load(args.corpus / "train.npz") as streams:
        stream = streams["all"]
    choices = torch.tensor([1.0, 1.0, 0.7, 0.0])
    parts: list[np.ndarray] = []
    begun = time.perf_counter()
    while not parts or time.perf_counter() - begun < args.minutes * 60:
        starts = rng.integers(0, len(stream) - args.prompt, args.rows)
        prompts = np.stack([stream[at : at + args.prompt] for at in starts]).astype(np.int64)
        temperature = choices[torch.arange(args.rows) % len(choices)]
        text = continue_text(model, torch.from_numpy(prompts), args.count, temperature, generator)
        parts.append(text.numpy().astype(np.uint16))
        np.save(args.out, np.concatenate(parts))
        speed = len(parts) * args.rows * args.count / (time.perf_counter() - begun)
        print(f"{len(parts) * args.rows} rows, {speed:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
