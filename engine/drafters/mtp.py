"""MTP-1: a multi-token-prediction module of depth one, a whole Qwen3 layer behind the target's last.

The equations are DeepSeek-V3's (technical report, section 2.2), under the names of Qwen's own newer checkpoints:

    u_i = mtp.fc [mtp.pre_fc_norm_embedding(embedding of x_{i+1}); mtp.pre_fc_norm_hidden(h_i)]
    g_i = mtp.norm(mtp.layers.0(u_0 … u_i)),   logits of x_{i+2} = lm_head(g_i)

h_i is the target's final normed hidden state; where more tokens than one are drafted, g_i stands in for the next h.

Dense Qwen3 has no published module, so this is the format served here. A folder of its own: `architectures`
["Qwen3MTPModel"], the target's own keys with `num_hidden_layers` 1, and `block_size` (default 1). Tensors:
`mtp.fc.weight` [D, 2D], `mtp.pre_fc_norm_embedding.weight`, `mtp.pre_fc_norm_hidden.weight`, `mtp.norm.weight` and
`mtp.layers.0.*`, named as in any Qwen3 layer. Norm weights multiply as they are (Qwen3-Next stores them less one).
Copies of `embed_tokens.weight` and `lm_head.weight` may be there. A reduced draft vocabulary is optional, see
`attachment`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.drafters.attachment import read_block_size
from engine.drafters.autoregressive import AutoregressiveDrafter
from engine.errors import LoadError
from engine.models.decoder import DecoderModel
from engine.models.layers import load_layer
from engine.models.loader import Checkpoint
from kernels.decoder_layer import Rows, decoder_layer
from kernels.matmul import matmul, pack
from kernels.rms_norm import rms_norm


class MTPDrafter(AutoregressiveDrafter):
    """An MTP-1 module attached to a target whose embedding, final norm and lm_head it shares.

    Raises:
        LoadError: a key or tensor is missing, of the wrong shape, or belongs to another target.
    """

    ARCHITECTURE = "Qwen3MTPModel"
    kind = "mtp"

    def __init__(self, directory: Path, target: DecoderModel) -> None:
        super().__init__(directory, target)
        g, dtype, device = self.geometry, target.dtype, target.device
        if g.layers != 1:
            raise LoadError(f"{directory / 'config.json'}: num_hidden_layers is {g.layers}; an MTP-1 module has 1")
        self.feature_layers = (target.geometry.layers - 1,)
        checkpoint = Checkpoint(directory)
        self.read_vocabulary(checkpoint)

        def take(name: str, *shape: int) -> torch.Tensor:
            kind = dtype if len(shape) == 2 else target.activations
            return checkpoint.take(f"mtp.{name}.weight", shape, kind).to(device)

        self.fc = pack(take("fc", g.hidden_size, 2 * g.hidden_size))
        self.token_norm = take("pre_fc_norm_embedding", g.hidden_size)
        self.hidden_norm = take("pre_fc_norm_hidden", g.hidden_size)
        self.layer = load_layer(checkpoint, "mtp.layers.0", g, dtype, device)
        self.norm = take("norm", g.hidden_size)
        checkpoint.refuse_leftovers(ignore=("rotary_emb.inv_freq",))

    def read_block_size(self) -> int:
        return read_block_size(self.config, self.directory, 1)

    def enter(self, features: torch.Tensor) -> torch.Tensor:
        return rms_norm(features, self.target.norm, self.target.geometry.eps)

    def advance(self, state: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        eps = self.geometry.eps
        embedded = rms_norm(self.target.embed(tokens), self.token_norm, eps)
        x = matmul(torch.cat([embedded, rms_norm(state, self.hidden_norm, eps)], dim=-1), self.fc)
        decoder_layer(x, self.layer, self.caches[0], self.rope, rows)
        return rms_norm(x, self.norm, eps)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        return matmul(state, self.lm_head).float()
