"""Qwen3 dense decoders over paged caches (REFERENCE: the Qwen3 technical report's architecture)."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.errors import LoadError
from engine.models.layers import Geometry, activation_dtype, load_layer, new_cache, read_geometry
from engine.models.loader import Checkpoint, read_json
from engine.types import Batch
from kernels.embedding import embedding
from kernels.forward import Ends, LayerStack, Rows, forward
from kernels.matmul import pack
from kernels.rope import rope_table


class Qwen3Model:
    """The target: unchanged weights, a forward pass over ragged rows.

    Args:
        directory: holds config.json and the weights.
        dtype: of weights and caches; `activations` follow from it and the device.
        max_length: positions that the rope table covers.

    Raises:
        LoadError: the checkpoint does not fit the architecture; names the key or tensor.
    """

    ARCHITECTURE = "Qwen3ForCausalLM"

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device, max_length: int | None) -> None:
        config = read_json(directory / "config.json")
        self.geometry: Geometry = read_geometry(config, directory)
        g = self.geometry
        limit = g.max_positions
        self.max_length = limit if max_length is None else max_length
        if self.max_length > limit:
            raise LoadError(f"max_model_len {max_length} is above the model's {limit} positions; lower it")
        self.dtype = dtype
        self.activations = activation_dtype(dtype, device)
        self.device = device
        checkpoint = Checkpoint(directory)
        self.embedding = checkpoint.take("model.embed_tokens.weight", (g.vocab_size, g.hidden_size), dtype).to(device)
        self.layers = tuple(load_layer(checkpoint, f"model.layers.{i}", g, dtype, device) for i in range(g.layers))
        self.norm = checkpoint.take("model.norm.weight", (g.hidden_size,), self.activations).to(device)
        head = self.embedding
        if "lm_head.weight" in checkpoint:
            head = checkpoint.take("lm_head.weight", (g.vocab_size, g.hidden_size), dtype).to(device)
            if g.tied and not torch.equal(head, self.embedding):
                raise LoadError(f"{directory}: lm_head.weight differs from the embedding, but config.json ties them")
        elif not g.tied:
            raise LoadError(f"{directory}: tensor lm_head.weight is missing (tie_word_embeddings is false)")
        self.head_weight = head
        self.head = pack(head)
        checkpoint.refuse_leftovers(ignore=("rotary_emb.inv_freq",))
        self.rope = rope_table(self.max_length, g.head_dim, g.rope_theta, device)
        self.ends = Ends(self.embedding, self.norm, g.eps, self.head)
        self.allocate(1)

    @property
    def parameters(self) -> int:
        """Weights counted once, tied ones too."""
        g = self.geometry
        per_layer = (
            2 * g.hidden_size
            + 2 * g.head_dim
            + g.hidden_size * (2 * g.heads * g.head_dim + 2 * g.kv_width)
            + 3 * g.hidden_size * g.intermediate_size
        )
        embeddings = g.vocab_size * g.hidden_size * (1 if self.head_weight is self.embedding else 2)
        return g.layers * per_layer + g.hidden_size + embeddings

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden] of the embedding."""
        return embedding(self.embedding, tokens, self.activations)

    def allocate(self, pages: int) -> None:
        """Make the caches, `pages` pages a layer."""
        self.caches = tuple(new_cache(self.geometry, pages, self.dtype, self.device) for _ in self.layers)
        self.stack = LayerStack(self.layers, self.caches)

    def forward(self, batch: Batch, capture: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the batch's rows, writing their K and V.

        Args:
            capture: layer ids whose outputs a drafter asked for; −1 is the embedding's.

        Returns:
            Logits [L, V] float32 of `batch.logit_rows`, and features [T, len(capture) · hidden] or None.
        """
        rows = Rows(batch.positions, batch.row_sequence, batch.slots, batch.page_table)
        chosen = batch.logit_rows if len(batch.logit_rows) != len(batch.input_ids) else None
        logits, _, features = forward(batch.input_ids, self.ends, self.stack, self.rope, rows, capture, chosen)
        return logits, features
