"""DSpark's equations, straight from the paper, for one sequence at a time and without any cache.

Features come from transformers' hidden states; everything is recomputed from the token list. Used to hold the
engine's drafter against; shares no code with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3ForCausalLM


@dataclass
class Block:
    """One block's slots before any token is drawn: hidden [γ, H] and base logits [γ, V]."""

    hidden: Tensor
    base: Tensor


class Oracle:
    """A saved drafter as arithmetic.

    Args:
        directory: config.json and model.safetensors under the published names.
    """

    def __init__(self, directory: Path, target: Qwen3ForCausalLM) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.w = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
        self.target = target
        self.gamma = self.config["block_size"]
        self.head = self.config["markov_head_type"] if self.config["markov_rank"] else "none"

    @torch.inference_mode()
    def block(self, tokens: list[int]) -> Block:
        """The block after `tokens`, whose last is the anchor at position n = len(tokens) − 1."""
        n, c, w = len(tokens) - 1, self.config, self.w
        # Causal, so the anchor's presence changes no earlier feature; its own is not used.
        states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        features = torch.cat([states[i + 1][0, :n] for i in c["target_layer_ids"]], -1)
        context = self._norm(features @ w["fc.weight"].T, "hidden_norm")
        x = self.target.model.embed_tokens(torch.tensor([tokens[-1]] + [c["mask_token_id"]] * (self.gamma - 1)))
        for i in range(c["num_hidden_layers"]):
            x = self._layer(f"layers.{i}", x, context, n)
        hidden = self._norm(x, "norm")
        head = self.target.lm_head.weight
        if "d2t" in w:
            head = w.get("lm_head.weight", head[self.draft_ids])
        return Block(hidden, hidden @ head.T)

    def _layer(self, name: str, x: Tensor, context: Tensor, n: int) -> Tensor:
        """Slots attend to the context and to all slots, both ways; context rows get no input norm."""
        c, w = self.config, self.w
        heads, kv_heads, width = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        h = self._norm(x, f"{name}.input_layernorm")
        rows = torch.cat([context, h])
        q = (h @ w[f"{name}.self_attn.q_proj.weight"].T).view(-1, heads, width)
        k = (rows @ w[f"{name}.self_attn.k_proj.weight"].T).view(-1, kv_heads, width)
        v = (rows @ w[f"{name}.self_attn.v_proj.weight"].T).view(-1, kv_heads, width)
        q = self._rotate(self._norm(q, f"{name}.self_attn.q_norm"), torch.arange(n, n + self.gamma))
        k = self._rotate(self._norm(k, f"{name}.self_attn.k_norm"), torch.arange(n + self.gamma))
        out = torch.empty_like(q)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, shared].T / width**0.5
            out[:, head] = scores.softmax(-1) @ v[:, shared]
        x = x + out.flatten(1) @ w[f"{name}.self_attn.o_proj.weight"].T
        h = self._norm(x, f"{name}.post_attention_layernorm")
        gate, up = (h @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        return x + (torch.nn.functional.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T

    @torch.inference_mode()
    def step(
        self, block: Block, k: int, previous: int, state: Tensor | None
    ) -> tuple[Tensor, float | None, Tensor | None]:
        """Slot k after token x_{k} = `previous`: corrected logits [V], confidence, next recurrent state.

        Tokens that a reduced draft vocabulary lacks have −inf.
        """
        w, h, logits = self.w, block.hidden[k], block.base[k].clone()
        row = torch.zeros(0)
        if self.head != "none":
            row = w["markov_head.markov_w1.weight"][previous]
            w2 = w["markov_head.markov_w2.weight"]
            rank = len(row)
        if self.head == "vanilla":
            logits += w2 @ row
        if self.head == "gated":
            gate = w["markov_head.gate_proj.weight"] @ torch.cat([h, row]) + w["markov_head.gate_proj.bias"]
            logits += w2 @ (torch.sigmoid(gate) * row)
        if self.head == "rnn":
            state = torch.zeros(rank) if state is None else state
            z = w["markov_head.joint_proj.weight"] @ torch.cat([state, row, h]) + w["markov_head.joint_proj.bias"]
            g, c, o = z[:rank], z[rank : 2 * rank], z[2 * rank :]
            state = torch.sigmoid(g) * state + (1 - torch.sigmoid(g)) * torch.tanh(c)
            logits += w2 @ torch.tanh(o)
        confidence = None
        if self.config["enable_confidence_head"]:
            seen = torch.cat([h, row]) if self.config["confidence_head_with_markov"] else h
            value = w["confidence_head.proj.weight"][0] @ seen + w["confidence_head.proj.bias"][0]
            confidence = float(torch.sigmoid(value))
        if "d2t" in self.w:
            narrow, logits = logits, torch.full((self.config["vocab_size"],), -torch.inf)
            for draft_id, target_id in enumerate(self.draft_ids):
                logits[target_id] = narrow[draft_id]
        return logits, confidence, state

    @property
    def draft_ids(self) -> list[int]:
        return [draft_id + int(ahead) for draft_id, ahead in enumerate(self.w["d2t"])]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rope on x [T, heads, D]: the first half of D paired with the second."""
        width = self.config["head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"]
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = (positions[:, None].double() * frequency)[:, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
