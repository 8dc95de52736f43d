"""What the target families share: decoders over paged caches, run by one call.

A family reads its config.json and its layers; the rest is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from engine.errors import LoadError
from engine.models.layers import Geometry, activation_dtype, new_cache
from engine.models.loader import Checkpoint, read_json
from engine.types import Batch
from kernels.decoder_layer import LayerWeights
from kernels.embedding import embedding
from kernels.forward import Ends, LayerStack, Rows, forward
from kernels.matmul import pack
from kernels.rope import rope_table


class DecoderModel(ABC):
    """The target: unchanged weights, a forward pass over ragged rows.

    Args:
        directory: holds config.json and the weights.
        dtype: of weights and caches; `activations` follow from it and the device.
        max_length: positions that the rope tables cover.

    Raises:
        LoadError: the checkpoint does not fit the architecture; names the key or tensor.
    """

    ARCHITECTURES: tuple[str, ...]
    # Tensors that checkpoints carry and this family's decoder has no use for.
    IGNORED_ENDINGS: tuple[str, ...] = ("rotary_emb.inv_freq",)
    IGNORED_BEGINNINGS: tuple[str, ...] = ()

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device, max_length: int | None) -> None:
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self.geometry: Geometry = self.read_geometry(self.config, directory)
        g = self.geometry
        self.max_length = g.max_positions if max_length is None else max_length
        if self.max_length > g.max_positions:
            raise LoadError(f"max_model_len {max_length} is above the model's {g.max_positions} positions; lower it")
        self.dtype = dtype
        self.activations = activation_dtype(dtype, device)
        self.device = device
        checkpoint = Checkpoint(directory)
        self.prefix = self.find_prefix(checkpoint)
        shape = (g.vocab_size, g.hidden_size)
        self.embedding = checkpoint.take(f"{self.prefix}embed_tokens.weight", shape, dtype).to(device)
        self.rope = rope_table(self.max_length, g.head_dim, g.rope_theta, device, factor=g.rope_factor)
        self.layers = self.load_layers(checkpoint)
        self.norm = self.load_norm(checkpoint)
        head = self.embedding
        if "lm_head.weight" in checkpoint:
            head = checkpoint.take("lm_head.weight", shape, dtype).to(device)
            if g.tied and not torch.equal(head, self.embedding):
                raise LoadError(f"{directory}: lm_head.weight differs from the embedding, but config.json ties them")
        elif not g.tied:
            raise LoadError(f"{directory}: tensor lm_head.weight is missing (tie_word_embeddings is false)")
        self.head_weight = head
        self.head = pack(head)
        checkpoint.refuse_leftovers(self.IGNORED_ENDINGS, self.IGNORED_BEGINNINGS)
        self.ends = Ends(self.embedding, self.norm, g.eps, self.head, self.embedding_scale)
        self.allocate(1)

    @abstractmethod
    def read_geometry(self, config: dict[str, Any], directory: Path) -> Geometry:
        """Sizes from config.json.

        Raises:
            LoadError: a key is missing, of the wrong type, or asks for something that is not served.
        """

    @abstractmethod
    def load_layers(self, checkpoint: Checkpoint) -> tuple[LayerWeights, ...]:
        """The decoder's layers, once geometry, dtypes, device and `rope` are there."""

    def find_prefix(self, checkpoint: Checkpoint) -> str:
        """What the decoder's tensor names begin with."""
        return "model."

    def load_norm(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The last norm's gains, as they multiply."""
        name, width = f"{self.prefix}norm.weight", self.geometry.hidden_size
        return checkpoint.take(name, (width,), self.activations).to(self.device)

    @property
    def embedding_scale(self) -> float:
        """What multiplies the embedding's rows."""
        return 1.0

    @property
    def parameters(self) -> int:
        """Weights counted once, tied ones too."""
        g, total = self.geometry, self.norm.numel()
        for layer in self.layers:
            total += sum(matrix.n * matrix.k for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down))
            norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm)
            added = (layer.post_attention_norm, layer.post_feedforward_norm)
            total += sum(norm.numel() for norm in (*norms, *added) if norm is not None)
        return total + g.vocab_size * g.hidden_size * (1 if self.head_weight is self.embedding else 2)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden] of the embedding, as they enter the first layer."""
        return embedding(self.embedding, tokens, self.activations, self.embedding_scale)

    @property
    def window(self) -> int:
        """Positions that layers with a window see; 0 without such layers. All have one size."""
        return max(layer.window for layer in self.layers)

    def allocate(self, pages: int, window_pages: int | None = None) -> None:
        """Make the caches, `pages` pages a layer; `window_pages` in layers with a window, where that is given."""
        counts = [window_pages if layer.window and window_pages is not None else pages for layer in self.layers]
        self.caches = tuple(new_cache(self.geometry, count, self.dtype, self.device) for count in counts)
        self.stack = LayerStack(self.layers, self.caches)

    def forward(self, batch: Batch, capture: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the batch's rows, writing their K and V.

        Args:
            capture: layer ids whose outputs a drafter asked for; −1 is the embedding's.

        Returns:
            Logits [L, V] float32 of `batch.logit_rows`, and features [T, len(capture) · hidden] or None. Rows that
            `batch.kept` does not name may hold anything there.
        """
        rows = Rows(
            batch.positions,
            batch.row_sequence,
            batch.slots,
            batch.page_table,
            batch.window_slots,
            batch.window_table,
        )
        chosen = batch.logit_rows if len(batch.logit_rows) != len(batch.input_ids) else None
        logits, _, features = forward(
            batch.input_ids, self.ends, self.stack, self.rope, rows, capture, chosen, batch.kept
        )
        return logits, features
