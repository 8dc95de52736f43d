"""One training step's loss against an independent plain computation, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.anchors import choose_anchors
from engine.training.dspark import DSpark
from engine.training.loop import Trainer
from engine.training.plan import Plan
from engine.training.trainable import Batch
from engine.training.workers import Worker

ALONE = Worker(0, 1, torch.device("cpu"))


def trainer_and_batch(plan: Plan) -> tuple[Trainer, Batch]:
    trainer = Trainer(plan, ALONE)
    torch.manual_seed(9)
    with torch.no_grad():  # fresh heads are zeros or nearly so: a wrong sign would not show
        for weight in trainer.model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    length = plan.data.length
    tokens, mask = trainer.mixture.tokens(trainer.mixture.draws(0, 4, length), length)
    return trainer, trainer.batch(tokens, mask, trainer.mixture.uniforms(0, 4, length))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """x [heads, d] turned pair by pair."""
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        a, b = x[:, i], x[:, i + half]
        out[:, i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_block(model: DSpark, features: Tensor, anchor: int, token: int, table: Tensor) -> Tensor:
    """Hidden states [γ, D] of one block, with loops over positions and heads; features [T, n·D]."""
    w = dict(model.named_parameters())
    c, size = model.base, model.options.block_size
    context = norm(features[:anchor] @ w["fc.weight"].T, w["hidden_norm.weight"])
    ids = [token] + [model.options.mask_token_id] * (size - 1)
    x = table[torch.tensor(ids)]
    for layer in range(model.options.layers):
        p = f"layers.{layer}."
        inner = norm(x, w[p + "input_layernorm.weight"])

        def heads(source: Tensor, name: str, count: int, first: int, p: str = p) -> list[Tensor]:
            flat = source @ w[f"{p}self_attn.{name}_proj.weight"].T
            rows = [row.view(count, c.head_dim) for row in flat]
            if name == "v":
                return rows
            scaled = [norm(row, w[f"{p}self_attn.{name}_norm.weight"]) for row in rows]
            return [rotate(row, first + i, c.rope_theta) for i, row in enumerate(scaled)]

        groups = c.num_key_value_heads
        keys = heads(context, "k", groups, 0) + heads(inner, "k", groups, anchor)
        values = heads(context, "v", groups, 0) + heads(inner, "v", groups, anchor)
        outs = []
        for query in heads(inner, "q", c.num_attention_heads, anchor):
            parts = []
            for head in range(c.num_attention_heads):
                group = head // (c.num_attention_heads // groups)
                scores = torch.stack([query[head] @ key[group] for key in keys]) / math.sqrt(c.head_dim)
                share = scores.softmax(0)
                parts.append(sum(s * value[group] for s, value in zip(share, values, strict=True)))
            outs.append(torch.cat(parts))
        x = x + torch.stack(outs) @ w[p + "self_attn.o_proj.weight"].T
        inner = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(inner @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (inner @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"])


def plain_bias(model: DSpark, hidden: Tensor, previous: Tensor) -> Tensor:
    """The head's bias [γ, V] by its published formula, one slot after another."""
    w = {name.removeprefix("markov_head."): value for name, value in model.named_parameters()}
    if model.options.head == "none":
        return torch.zeros(())
    state, out = torch.zeros(model.options.markov_rank), []
    for h, token in zip(hidden, previous, strict=True):
        low = w["markov_w1.weight"][token]
        if model.options.head == "gated":
            latent = torch.sigmoid(w["gate_proj.weight"] @ torch.cat((h, low)) + w["gate_proj.bias"]) * low
        elif model.options.head == "rnn":
            joint = w["joint_proj.weight"] @ torch.cat((state, low, h)) + w["joint_proj.bias"]
            g, candidate, o = joint.split(len(low))
            state = torch.sigmoid(g) * state + (1 - torch.sigmoid(g)) * torch.tanh(candidate)
            latent = torch.tanh(o)
        else:
            latent = low
        out.append(w["markov_w2.weight"] @ latent)
    return torch.stack(out)


def plain_loss(trainer: Trainer, batch: Batch) -> float:
    """Equations 8 to 12, read off the paper, slot by slot."""
    model: DSpark = trainer.model
    terms, table = model.options.loss, batch.shared.embedding
    count = model.options.anchors * batch.tokens.shape[1] // 256
    anchors = choose_anchors(batch, count, model.options.block_size, model.options.first_anchor).anchors
    sums = {"entropy": 0.0, "distance": 0.0, "confidence": 0.0}
    ids = range(96) if model.vocabulary.ids is None else model.vocabulary.ids.tolist()
    total = 0.0
    for b, row in enumerate(anchors.tolist()):
        for anchor in row:
            tokens = batch.tokens[b]
            hidden = plain_block(model, batch.features[b], anchor, int(tokens[anchor]), table)
            previous = tokens[anchor : anchor + len(hidden)]
            narrow = hidden @ table[ids].T + plain_bias(model, hidden, previous)
            logits = torch.full((len(hidden), 96), -torch.inf)
            logits[:, ids] = narrow
            for k, h in enumerate(hidden):
                goal = anchor + k + 1
                if goal >= len(tokens) or not batch.loss_mask[b, goal]:
                    break
                weight = math.exp(-k / terms.decay)
                draft = logits[k].softmax(-1)
                wanted = (batch.hidden[b, anchor + k] @ table.T).softmax(-1)
                gap = float((draft - wanted).abs().sum())
                total += weight
                if int(tokens[goal]) in ids:
                    sums["entropy"] -= weight * math.log(float(draft[tokens[goal]]))
                sums["distance"] += weight * gap
                if model.confidence_head is not None:
                    seen = [h]
                    if model.options.confidence_with_markov and model.markov_head is not None:
                        seen.append(model.markov_head.markov_w1.weight[previous[k]])
                    guess = float(torch.sigmoid(model.confidence_head.proj(torch.cat(seen))))
                    label = 1 - gap / 2
                    sums["confidence"] -= weight * (label * math.log(guess) + (1 - label) * math.log(1 - guess))
    mixed = terms.cross_entropy * sums["entropy"] + terms.distance * sums["distance"]
    return (mixed + terms.confidence * sums["confidence"]) / total


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_steps_loss_is_the_papers(make_plan: Callable[..., Plan], head: str) -> None:
    trainer, batch = trainer_and_batch(make_plan(f"model.head={head}"))
    loss, _ = trainer.model.loss(batch)
    with torch.no_grad():
        assert float(loss) == pytest.approx(plain_loss(trainer, batch), rel=1e-5)


@pytest.mark.parametrize("changes", [(), ("model.loss.cross_entropy=0.1", "model.loss.distance=0.9")])
def test_dflash_has_two_recipes(make_plan: Callable[..., Plan], changes: tuple[str, ...]) -> None:
    trainer, batch = trainer_and_batch(make_plan(*changes, drafter="dflash"))
    loss, metrics = trainer.model.loss(batch)
    with torch.no_grad():
        assert float(loss) == pytest.approx(plain_loss(trainer, batch), rel=1e-5)
    if not changes:
        total, weight = metrics["cross_entropy"]
        assert trainer.model.options.loss.distance == 0 and float(total / weight) > 0


def test_chunks_change_neither_loss_nor_gradients(make_plan: Callable[..., Plan]) -> None:
    """The vocabulary is streamed: 5 rows at once give what all at once give."""
    found = []
    for chunk in (96 * 5, 2**24):
        trainer, batch = trainer_and_batch(make_plan(f"model.chunk={chunk}", "model.head=gated", out=str(chunk)))
        loss, _ = trainer.model.loss(batch)
        loss.backward()
        found.append((loss.detach(), [weight.grad for weight in trainer.model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None and torch.allclose(one, other, atol=1e-6, rtol=1e-4)


def test_gradients_are_those_of_the_unstreamed_loss(make_plan: Callable[..., Plan]) -> None:
    """Finite differences on a few weights, fp32: the streamed gradient points the same way."""
    trainer, batch = trainer_and_batch(make_plan("model.head=rnn"))
    model = trainer.model
    loss, _ = model.loss(batch)
    loss.backward()
    torch.manual_seed(1)
    for name in ("fc.weight", "markov_head.markov_w2.weight", "markov_head.markov_w1.weight"):
        weight = dict(model.named_parameters())[name]
        assert weight.grad is not None
        direction = weight.grad / weight.grad.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(sign * 2e-2 * direction)
                values.append(float(model.loss(batch)[0]))
                weight.sub_(sign * 2e-2 * direction)
        # The confidence label is a constant to the gradient but not to differences, hence the margin.
        assert (values[0] - values[1]) / 4e-2 == pytest.approx(float(weight.grad.norm()), rel=0.15)


def test_a_block_stops_counting_where_a_document_ends(make_plan: Callable[..., Plan]) -> None:
    _, batch = trainer_and_batch(make_plan())
    blocks = choose_anchors(batch, 8, 7, 8)
    for b in range(len(batch.tokens)):
        for row in range(8):
            anchor = int(blocks.anchors[b, row])
            seen = batch.tokens[b, anchor : anchor + 7].tolist()
            ended = [0 in seen[: k + 1] for k in range(len(seen))]
            assert [bool(v) for v in blocks.valid[b, row]] == [not e for e in ended]


def test_the_frozen_target_gets_no_gradient_and_is_not_exported(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer, batch = trainer_and_batch(make_plan())
    loss, _ = trainer.model.loss(batch)
    loss.backward()
    assert all(weight.grad is None for weight in trainer.frozen.model.parameters())
    trainer.model.export(tmp_path / "drafter")
    names = load_file(tmp_path / "drafter" / "model.safetensors")
    assert not any(name.startswith(("embed_tokens", "lm_head")) for name in names)
