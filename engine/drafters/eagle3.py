"""Eagle3: one decoder layer that reads the target's features once, then its own output, token after token.

Format and equations are those of DeepSpec's Qwen3 Eagle3. A layer's attention reads
[input_layernorm(embedding of the following token); hidden_norm(h)], of width 2D; its residual is the un-normed h, which
is fc(features) in context rows and the layers' own un-normed output in drafted ones. Logits are lm_head(norm(h)).

A reduced draft vocabulary is optional, see `attachment`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.drafters.attachment import read_block_size, read_feature_layers
from engine.drafters.autoregressive import AutoregressiveDrafter
from engine.errors import LoadError
from engine.models.decoder import DecoderModel
from engine.models.layers import load_layer, take_qkv
from engine.models.loader import Checkpoint
from kernels.decoder_layer import Rows, decoder_layer
from kernels.matmul import matmul, pack
from kernels.rms_norm import rms_norm


class Eagle3Drafter(AutoregressiveDrafter):
    """A drafter in the public checkpoint format, attached to a target whose embedding and lm_head it shares.

    Proposes `block_size` tokens, or as many as it was trained to unroll (`ttt_length`).

    Raises:
        LoadError: a key or tensor is missing, of the wrong shape, or belongs to another target.
    """

    ARCHITECTURE = "Qwen3Eagle3Model"
    kind = "eagle3"

    def __init__(self, directory: Path, target: DecoderModel) -> None:
        super().__init__(directory, target)
        g, dtype, device = self.geometry, target.dtype, target.device
        self.feature_layers = read_feature_layers(self.config, target, directory)
        depth = self.config.get("draft_num_hidden_layers", g.layers)
        if depth != g.layers:
            source = directory / "config.json"
            raise LoadError(f"{source}: draft_num_hidden_layers {depth} and num_hidden_layers {g.layers} differ")
        checkpoint = Checkpoint(directory)
        self.read_vocabulary(checkpoint)
        width = len(self.feature_layers) * g.hidden_size
        self.fc = pack(checkpoint.take("fc.weight", (g.hidden_size, width), dtype).to(device))
        self.norm = checkpoint.take("norm.weight", (g.hidden_size,), target.activations).to(device)
        self.layers, self.token_norms, self.token_qkv = [], [], []
        for i in range(g.layers):
            prefix = f"layers.{i}"
            tokens, hidden = take_qkv(checkpoint, prefix, g, dtype, device, 2 * g.hidden_size).chunk(2, dim=1)
            # The half that reads h is a common layer; the other half of q, k and v is where its rows start from.
            self.layers.append(load_layer(checkpoint, prefix, g, dtype, device, input_norm="hidden_norm", qkv=hidden))
            norm = checkpoint.take(f"{prefix}.input_layernorm.weight", (g.hidden_size,), target.activations)
            self.token_norms.append(norm.to(device))
            self.token_qkv.append(pack(tokens))
        checkpoint.refuse_leftovers(ignore=("rotary_emb.inv_freq",))

    def read_block_size(self) -> int:
        return read_block_size(self.config, self.directory, self.config.get("ttt_length"))

    def enter(self, features: torch.Tensor) -> torch.Tensor:
        return matmul(features, self.fc)

    def advance(self, state: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        embedded = self.target.embed(tokens)
        for i, layer in enumerate(self.layers):
            start = matmul(rms_norm(embedded, self.token_norms[i], self.geometry.eps), self.token_qkv[i])
            decoder_layer(state, layer, self.caches[i], self.rope, rows, start)
        return state

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        return matmul(rms_norm(state, self.norm, self.geometry.eps), self.lm_head).float()
