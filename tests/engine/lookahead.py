"""Eagle3 and MTP-1 in tests: random checkpoints in the public formats, and their equations in plain torch.

The oracle recomputes everything from the token list, context included, for every token; it shares no code with the
engine and offers what `Judge` asks of DSpark's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM


class _Random:
    """Random tensors by name."""

    def __init__(self, config: Any, seed: int, scale: float) -> None:
        self.config = config
        self.scale = scale
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def matrix(self, name: str, *shape: int) -> None:
        self.tensors[name] = torch.randn(*shape, generator=self.generator) * self.scale

    def norm(self, name: str, size: int) -> None:
        self.tensors[name] = 1 + 0.2 * torch.randn(size, generator=self.generator)

    def layer(self, prefix: str, width: int) -> None:
        c = self.config
        hidden, attention = c.hidden_size, c.num_attention_heads * c.head_dim
        self.norm(f"{prefix}.input_layernorm.weight", hidden)
        self.norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.matrix(f"{prefix}.self_attn.q_proj.weight", attention, width)
        for part in ("k", "v"):
            self.matrix(f"{prefix}.self_attn.{part}_proj.weight", c.num_key_value_heads * c.head_dim, width)
        self.matrix(f"{prefix}.self_attn.o_proj.weight", hidden, attention)
        for part in ("q", "k"):
            self.norm(f"{prefix}.self_attn.{part}_norm.weight", c.head_dim)
        for part in ("gate", "up"):
            self.matrix(f"{prefix}.mlp.{part}_proj.weight", c.intermediate_size, hidden)
        self.matrix(f"{prefix}.mlp.down_proj.weight", hidden, c.intermediate_size)

    def save(self, directory: Path, changes: dict[str, Any], target: Qwen3ForCausalLM, copies: bool) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        config = {**json.loads(self.config.to_json_string()), **changes}
        (directory / "config.json").write_text(json.dumps(config))
        if copies:
            self.tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.detach().clone()
            self.tensors.setdefault("lm_head.weight", target.lm_head.weight.detach().clone())
        save_file(self.tensors, directory / "model.safetensors")
        return directory


def save_eagle3(
    directory: Path,
    target: Qwen3ForCausalLM,
    *,
    block: int = 5,
    layers: int = 1,
    feature_layers: tuple[int, ...] = (0, 2),
    draft_ids: tuple[int, ...] = (),
    own_head: bool = True,
    copies: bool = False,
    scale: float = 0.2,
    seed: int = 1,
) -> Path:
    """Write an Eagle3 drafter as DeepSpec does.

    Args:
        draft_ids: the reduced draft vocabulary, in draft order; empty for none.
        own_head: whether a reduced vocabulary comes with an lm_head of its own.
        copies: whether to add copies of the target's embedding and lm_head, as published checkpoints do.
    """
    c = target.config
    made = _Random(c, seed, scale)
    made.matrix("fc.weight", c.hidden_size, len(feature_layers) * c.hidden_size)
    made.norm("norm.weight", c.hidden_size)
    for i in range(layers):
        made.layer(f"layers.{i}", 2 * c.hidden_size)
        made.norm(f"layers.{i}.hidden_norm.weight", c.hidden_size)
    changes: dict[str, Any] = {
        "architectures": ["Qwen3Eagle3Model"],
        "num_hidden_layers": layers,
        "draft_num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "target_layer_ids": list(feature_layers),
        "ttt_length": block,
        "step_loss_decay": 0.8,
        "tie_word_embeddings": False,
    }
    if draft_ids:
        changes["draft_vocab_size"] = len(draft_ids)
        made.tensors["d2t"] = torch.tensor(draft_ids) - torch.arange(len(draft_ids))
        made.tensors["t2d"] = torch.zeros(c.vocab_size, dtype=torch.bool)
        made.tensors["t2d"][list(draft_ids)] = True
        if own_head:
            made.matrix("lm_head.weight", len(draft_ids), c.hidden_size)
    return made.save(directory, changes, target, copies)


def save_mtp(
    directory: Path,
    target: Qwen3ForCausalLM,
    *,
    block: int | None = None,
    copies: bool = False,
    scale: float = 0.2,
    seed: int = 1,
) -> Path:
    """Write an MTP-1 module; `block` None leaves block_size out."""
    c = target.config
    made = _Random(c, seed, scale)
    made.matrix("mtp.fc.weight", c.hidden_size, 2 * c.hidden_size)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        made.norm(f"mtp.{name}.weight", c.hidden_size)
    made.layer("mtp.layers.0", c.hidden_size)
    changes: dict[str, Any] = {"architectures": ["Qwen3MTPModel"], "num_hidden_layers": 1}
    changes["layer_types"] = ["full_attention"]
    if block is not None:
        changes["block_size"] = block
    return made.save(directory, changes, target, copies)


@dataclass
class Context:
    """Rows so far: what each starts from [T, D] and the token that follows it, and what each leaves [T, D]."""

    start: Tensor
    following: list[int]
    left: Tensor


class LookAheadOracle:
    """A saved Eagle3 or MTP-1 drafter as arithmetic.

    Args:
        directory: config.json and model.safetensors under the public names.
    """

    def __init__(self, directory: Path, target: Qwen3ForCausalLM) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.w = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
        self.target = target
        self.embedding = target.model.embed_tokens.weight
        self.eagle3 = self.config["architectures"] == ["Qwen3Eagle3Model"]
        self.gamma: int = self.config.get("block_size", self.config.get("ttt_length", 1))

    @torch.inference_mode()
    def block(self, tokens: list[int]) -> Context:
        """The absorbed rows 0 … n−1, tokens[n] being the anchor: they follow from the whole text before it."""
        n = len(tokens) - 1
        states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        if self.eagle3:
            features = torch.cat([states[i + 1][0, :n] for i in self.config["target_layer_ids"]], -1)
            start = features @ self.w["fc.weight"].T
        else:
            start = states[-1][0, :n]  # transformers' last entry is normed already
        return Context(start, tokens[1:], self.run(start, tokens[1:]))

    @torch.inference_mode()
    def step(
        self, block: Context, k: int, previous: int, state: Context | None
    ) -> tuple[Tensor, float | None, Context | None]:
        """Draft logits [V] of x_{k+1} after x_k = `previous`; no confidence; the rows by then."""
        rows = block if state is None else state
        if k:
            start = torch.cat([rows.start, rows.left[-1:]])
            following = [*rows.following, previous]
            rows = Context(start, following, self.run(start, following))
        return self.logits(rows.left[-1]), None, rows

    def run(self, start: Tensor, following: list[int]) -> Tensor:
        """Every row of the text at once, causally."""
        embedded, w = self.embedding[following], self.w
        if self.eagle3:
            h = start
            for i in range(self.config["num_hidden_layers"]):
                name = f"layers.{i}"
                parts = (self.norm(embedded, f"{name}.input_layernorm"), self.norm(h, f"{name}.hidden_norm"))
                h = self.layer(name, h, torch.cat(parts, -1))
            return h
        parts = (self.norm(embedded, "mtp.pre_fc_norm_embedding"), self.norm(start, "mtp.pre_fc_norm_hidden"))
        x = torch.cat(parts, -1) @ w["mtp.fc.weight"].T
        x = self.layer("mtp.layers.0", x, self.norm(x, "mtp.layers.0.input_layernorm"))
        return self.norm(x, "mtp.norm")

    def logits(self, left: Tensor) -> Tensor:
        h = self.norm(left, "norm") if self.eagle3 else left
        if "d2t" not in self.w:
            return self.target.lm_head.weight @ h
        ids = (self.w["d2t"] + torch.arange(len(self.w["d2t"]))).long()
        logits = torch.full((self.config["vocab_size"],), -torch.inf)
        logits[ids] = self.w.get("lm_head.weight", self.target.lm_head.weight[ids]) @ h
        return logits

    def layer(self, name: str, x: Tensor, normed: Tensor) -> Tensor:
        """A Qwen3 layer whose attention reads `normed` and whose residual is x."""
        c, w, count = self.config, self.w, len(x)
        heads, kv_heads, width = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q = (normed @ w[f"{name}.self_attn.q_proj.weight"].T).view(count, heads, width)
        k = (normed @ w[f"{name}.self_attn.k_proj.weight"].T).view(count, kv_heads, width)
        v = (normed @ w[f"{name}.self_attn.v_proj.weight"].T).view(count, kv_heads, width)
        q = self.rotate(self.norm(q, f"{name}.self_attn.q_norm"))
        k = self.rotate(self.norm(k, f"{name}.self_attn.k_norm"))
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        out = torch.empty_like(q)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = (q[:, head] @ k[:, shared].T / width**0.5).masked_fill(future, -torch.inf)
            out[:, head] = scores.softmax(-1) @ v[:, shared]
        x = x + out.flatten(1) @ w[f"{name}.self_attn.o_proj.weight"].T
        h = self.norm(x, f"{name}.post_attention_layernorm")
        gate, up = (h @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        return x + (torch.nn.functional.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def rotate(self, x: Tensor) -> Tensor:
        """Rope on x [T, heads, D] at positions 0 … T−1: the first half of D paired with the second."""
        width = self.config["head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"]
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = (torch.arange(len(x)).double()[:, None] * frequency)[:, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
