"""Eagle3's unrolling against the published formulation: every position at once, one growing cache of whole-text chunks.

DeepSpec runs each step over the whole text, row t of step k attending to rows 0 … t of the first chunk and to row t of
each later one, divides by texts times length, and adds the steps with weights 0.8^k. Ours unrolls block by block and
divides by the weights' sum: the same gradient but for its length, which neither AdamW nor Muon sees.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.eagle3 import Eagle3
from engine.training.trainable import Batch
from tests.training.test_unrolled import Bench


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [B, heads, T, d]."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def published(model: Eagle3, batch: Batch, decay: float) -> Tensor:
    """The loss of texts without the last token, which the other formulation knows as a goal only."""
    w, c, table = dict(model.named_parameters()), model.base, batch.shared.embedding
    tokens, features = batch.tokens[:, :-1], batch.features[:, :-1]
    texts, length = tokens.shape
    targets = F.linear(batch.hidden[:, :-1], table).softmax(-1)
    state, following = features @ w["fc.weight"].T, torch.cat((tokens[:, 1:], tokens[:, :1] * 0), 1)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    row, p = torch.arange(length), "layers.0."
    total = torch.zeros(())
    for step in range(model.steps):
        embedded = norm(table[following], w[p + "input_layernorm.weight"])
        inner = torch.cat((embedded, norm(state, w[p + "hidden_norm.weight"])), -1)

        def heads(name: str, count: int, inner: Tensor = inner) -> Tensor:
            flat = inner @ w[f"{p}self_attn.{name}_proj.weight"].T
            return flat.view(texts, length, count, c.head_dim).transpose(1, 2)

        place = row + step
        q = rotate(norm(heads("q", c.num_attention_heads), w[p + "self_attn.q_norm.weight"]), place, c.rope_theta)
        k = rotate(norm(heads("k", c.num_key_value_heads), w[p + "self_attn.k_norm.weight"]), place, c.rope_theta)
        share = c.num_attention_heads // c.num_key_value_heads
        keys.append(k.repeat_interleave(share, 1))
        values.append(heads("v", c.num_key_value_heads).repeat_interleave(share, 1))
        seen = [row[:, None] >= row] + [row[:, None] == row] * step
        scores = q @ torch.cat(keys, 2).transpose(-1, -2) / c.head_dim**0.5
        weights = scores.masked_fill(~torch.cat(seen, 1), -torch.inf).softmax(-1)
        mixed = (weights @ torch.cat(values, 2)).transpose(1, 2).flatten(2)
        x = state + mixed @ w[p + "self_attn.o_proj.weight"].T
        inner = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(inner @ w[p + "mlp.gate_proj.weight"].T) * (inner @ w[p + "mlp.up_proj.weight"].T)
        state = x + gate @ w[p + "mlp.down_proj.weight"].T
        log_draft = F.linear(norm(state, w["norm.weight"]), table).log_softmax(-1)
        known = length - 1 - step  # rows whose token and target distribution the text holds
        each = -(targets[:, step + 1 :][:, :known] * log_draft[:, :known]).sum(-1)
        total = total + decay**step * each.sum() / (texts * length)
        following = torch.cat((following[:, 1:], following[:, :1] * 0), 1)
    return total


def test_the_unrolling_is_the_published_one(tiny_target: Path, tmp_path: Path) -> None:
    bench = Bench("eagle3", tiny_target, tmp_path, anchors=0, first_anchor=1)
    model, decay = bench.model, bench.model.terms.decay
    assert isinstance(model, Eagle3) and decay == 0.8
    batch = bench.batch(torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(5)))
    loss, _ = model.loss(batch)
    loss.backward()
    ours = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    expected = published(model, batch, decay)
    expected.backward()
    length = batch.tokens.shape[1] - 1
    scale = sum(decay**k * 2 * (length - 1 - k) for k in range(model.steps)) / (2 * length)
    assert float(loss.detach()) * scale == pytest.approx(float(expected.detach()), rel=1e-5)
    for mine, weight in zip(ours, model.parameters(), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(mine * scale, weight.grad, rtol=1e-4, atol=1e-6)
