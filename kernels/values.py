"""The values that the forward-pass ops share. Tensors are never copied here; every shape is checked once.

A page holds `PAGE` token slots. Inside a page keys lie transposed, [head_dim, PAGE], so that the scores of a
page's keys accumulate as one vector over head_dim; values lie as they are, [PAGE, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.packed import FULL as FULL
from kernels.packed import HALVED as HALVED
from kernels.packed import PAIRED as PAIRED
from kernels.packed import PANEL as PANEL
from kernels.packed import TILED as TILED
from kernels.packed import PackedMatrix as PackedMatrix

PAGE = 16  # slots a page; a slot is page · PAGE + offset
SILU, GELU_TANH = range(2)  # what gates a layer's second half


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary angles of every position: `cos` and `sin` [L, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor
    words: tuple[int, int] = field(init=False, repr=False, compare=False)  # their addresses

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", (self.cos.data_ptr(), self.sin.data_ptr()))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's K/V pages: `k` [pages, kv_heads, head_dim, PAGE], `v` [pages, kv_heads, PAGE, head_dim].

    The bfloat16 caches of a CPU are paired, as its products want them: `k` [pages, kv_heads, head_dim / 2, PAGE, 2]
    has neighbours in head_dim side by side, `v` [pages, kv_heads, PAGE / 2, head_dim, 2] neighbouring slots.
    Elsewhere a slot's key lies in one piece, like its value: `k` is the transpose of [pages, kv_heads, PAGE, head_dim].
    """

    k: Tensor
    v: Tensor
    words: np.ndarray = field(init=False, repr=False, compare=False)  # kernels.layer_frame's view of it
    address: int = field(init=False, repr=False, compare=False)  # of words; 0 where native code does not apply

    def __post_init__(self) -> None:
        pages, kv_heads, head_dim = self.pages, self.kv_heads, self.head_dim
        k_shape, v_shape = cache_shapes(pages, kv_heads, head_dim, self.paired)
        if (tuple(self.k.shape), tuple(self.v.shape)) != (k_shape, v_shape):
            raise ValueError(f"cache shapes {tuple(self.k.shape)} and {tuple(self.v.shape)} do not fit together")
        dense = self.k.is_contiguous() or (not self.paired and self.k.mT.is_contiguous())
        if not (dense and self.v.is_contiguous()) or self.k.dtype != self.v.dtype:
            raise ValueError("cache tensors must be contiguous, and of one dtype")
        kinds = ((torch.float32, False), (torch.bfloat16, True))
        native = self.k.is_cpu and self.k.is_contiguous() and (self.k.dtype, self.paired) in kinds
        entries = (self.k.data_ptr(), self.v.data_ptr(), pages, kv_heads, head_dim, self.k.dtype.itemsize)
        object.__setattr__(self, "words", np.array(entries, np.int64))
        object.__setattr__(self, "address", self.words.ctypes.data if native else 0)

    @property
    def paired(self) -> bool:
        return self.k.dim() == 5

    @property
    def pages(self) -> int:
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[2] * (2 if self.paired else 1)


def double_bits(value: float) -> int:
    """A float64 as the integer of the same bits."""
    return int(np.float64(value).view(np.int64))


def cache_shapes(pages: int, kv_heads: int, head_dim: int, paired: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a LayerCache's k and v."""
    if paired:
        return (pages, kv_heads, head_dim // 2, PAGE, 2), (pages, kv_heads, PAGE // 2, head_dim, 2)
    return (pages, kv_heads, head_dim, PAGE), (pages, kv_heads, PAGE, head_dim)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One pre-norm transformer layer: attention with q/k norms and rope, then a gated block.

    `qkv` stacks the rows of q, k and v; `gate_up` those of gate and up. What Qwen3 has not is optional: norms of what
    each half adds to the residual (both or neither), another gate than SiLU, a window, and a rope of its own.
    """

    input_norm: Tensor  # [H]
    qkv: PackedMatrix  # [(heads + 2 kv_heads) · head_dim, H]
    q_norm: Tensor  # [head_dim]
    k_norm: Tensor  # [head_dim]
    o: PackedMatrix  # [H, heads · head_dim]
    post_norm: Tensor  # [H]
    gate_up: PackedMatrix  # [2 I, H]
    down: PackedMatrix  # [H, I]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv_bias: Tensor | None = None  # [(heads + 2 kv_heads) · head_dim]
    post_attention_norm: Tensor | None = None  # [H]
    post_feedforward_norm: Tensor | None = None  # [H]
    activation: int = SILU  # or GELU_TANH
    window: int = 0  # a row at p sees positions max(0, p − window + 1) … p; 0: all up to p
    scale: float | None = None  # of the scores; None: head_dim^−½
    rope: RopeTable | None = None  # in place of the one that the layers share
    words: np.ndarray = field(init=False, repr=False, compare=False)  # kernels.layer_frame's view of it
    address: int = field(init=False, repr=False, compare=False)  # of words; 0 where native code does not apply

    def __post_init__(self) -> None:
        hidden, width = self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim
        expected = {
            "qkv": (self.qkv.n, self.qkv.k, width, hidden),
            "o": (self.o.n, self.o.k, hidden, self.heads * self.head_dim),
            "gate_up": (self.gate_up.n, self.gate_up.k, 2 * self.down.k, hidden),
            "down": (self.down.n, self.down.k, hidden, self.down.k),
        }
        for name, (n, k, n_wanted, k_wanted) in expected.items():
            if (n, k) != (n_wanted, k_wanted):
                raise ValueError(f"{name} is [{n}, {k}], expected [{n_wanted}, {k_wanted}]")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide into {self.kv_heads} groups")
        if (self.post_attention_norm is None) != (self.post_feedforward_norm is None):
            raise ValueError("a layer norms what both of its halves add, or neither")
        if self.window < 0 or self.activation not in (SILU, GELU_TANH):
            raise ValueError(f"window {self.window} or activation {self.activation} is not one")
        if self.rope is not None and self.rope.cos.shape[1] * 2 != self.head_dim:
            raise ValueError(f"the rope table has {self.rope.cos.shape[1]} pairs for heads of {self.head_dim}")
        entries = self._describe()
        object.__setattr__(self, "words", np.array(entries, np.int64))
        object.__setattr__(self, "address", self.words.ctypes.data if entries else 0)

    @property
    def hidden(self) -> int:
        return self.input_norm.shape[0]

    @property
    def intermediate(self) -> int:
        return self.down.k

    @property
    def score_scale(self) -> float:
        """What multiplies q · k, rounded to float32."""
        scale = 1.0 / np.sqrt(np.float64(self.head_dim)) if self.scale is None else self.scale
        return float(np.float32(scale))

    @property
    def plain(self) -> bool:
        """Whether the layer has nothing that Qwen3's have not."""
        added = (self.post_attention_norm, self.scale, self.rope)
        return self.activation == SILU and self.window == 0 and all(value is None for value in added)

    def _describe(self) -> list[int]:
        """Addresses and sizes in the order of `kernels.layer_frame`; empty where native code does not apply."""
        matrices = (self.qkv, self.o, self.gate_up, self.down)
        vectors = [self.input_norm, self.q_norm, self.k_norm, self.post_norm]
        optional = (self.qkv_bias, self.post_attention_norm, self.post_feedforward_norm)
        angles = (None, None) if self.rope is None else (self.rope.cos, self.rope.sin)
        vectors += [v for v in (*optional, *angles) if v is not None]
        if not all(matrix.address for matrix in matrices) or self.head_dim % 32 or self.head_dim > 512:
            return []
        if any(v.dtype != torch.float32 or v.device.type != "cpu" or not v.is_contiguous() for v in vectors):
            return []
        entries = [self.hidden, self.intermediate, self.heads, self.kv_heads, self.head_dim]
        entries += [double_bits(self.eps)]
        entries += [v.data_ptr() for v in vectors[:4]]
        entries += [self.qkv_bias.data_ptr() if self.qkv_bias is not None else 0]
        for matrix in matrices:
            entries += [matrix.address, matrix.form]
        entries += [0 if v is None else v.data_ptr() for v in (*optional[1:], *angles)]
        return [*entries, self.activation, self.window, double_bits(self.score_scale)]


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Layers that run one after the other, each over its own cache."""

    layers: tuple[LayerWeights, ...]
    caches: tuple[LayerCache, ...]
    words: np.ndarray = field(init=False, repr=False, compare=False)  # addresses: layer, cache, layer, cache, …
    address: int = field(init=False, repr=False, compare=False)  # of words
    shape: tuple[int, ...] = field(init=False, repr=False, compare=False)  # see __post_init__
    angles: int | None = field(init=False, repr=False, compare=False)  # positions that every rope of its own covers
    windowed: bool = field(init=False, repr=False, compare=False)  # whether some layer has a window
    native: bool = field(init=False, repr=False, compare=False)  # whether native code applies

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.caches):
            raise ValueError(f"{len(self.layers)} layers do not go with {len(self.caches)} caches")
        pairs = [(layer.address, cache.address) for layer, cache in zip(self.layers, self.caches, strict=True)]
        first, widest = self.layers[0], max(layer.intermediate for layer in self.layers)
        shape = (first.hidden, first.heads, first.kv_heads, first.head_dim, widest, self.caches[0].k.dtype.itemsize)
        object.__setattr__(self, "words", np.array(pairs, np.int64).flatten())
        object.__setattr__(self, "address", self.words.ctypes.data)
        own = [len(layer.rope.cos) for layer in self.layers if layer.rope is not None]
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "angles", min(own, default=None))
        object.__setattr__(self, "windowed", any(layer.window for layer in self.layers))
        object.__setattr__(self, "native", all(layer and cache for layer, cache in pairs))


@dataclass(frozen=True, slots=True)
class Ends:
    """What stands before and behind a model's layers."""

    embedding: Tensor  # [V, H]
    norm: Tensor  # [H]
    eps: float
    head: PackedMatrix  # [V, H], or the rows of a reduced draft vocabulary
    scale: float = 1.0  # what multiplies the embedding's rows
    words: tuple[int, ...] = field(init=False, repr=False, compare=False)  # in the order of kernels.layer_frame
    native: bool = field(init=False, repr=False, compare=False)  # whether native code applies

    def __post_init__(self) -> None:
        table, norm, head = self.embedding, self.norm, self.head
        if table.shape[1] != head.k or head.n > table.shape[0] or norm.shape != (head.k,):
            raise ValueError(f"embedding {tuple(table.shape)}, norm and head [{head.n}, {head.k}] do not fit together")
        native = head.n == table.shape[0]  # not the reduced vocabulary of some drafters
        native = (
            native
            and bool(head.address)
            and table.dtype in (torch.float32, torch.bfloat16)
            and norm.dtype == torch.float32
        )
        native = native and table.is_cpu and table.is_contiguous() and norm.is_contiguous()
        table_words = (table.data_ptr(), table.dtype.itemsize, head.n)
        words = (*table_words, norm.data_ptr(), double_bits(self.eps), head.address, head.form, double_bits(self.scale))
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "native", native)


class Rows(NamedTuple):
    """The flat rows of a ragged batch, and where their keys and values lie. R sequences, T rows."""

    positions: Tensor  # [T] int64
    row_sequence: Tensor  # [T] int64: which row of page_table
    slots: Tensor  # [T] int64: page · PAGE + offset
    page_table: Tensor  # [R, P] int64, −1 padded: page of positions PAGE·j … PAGE·j + PAGE − 1
    # The same for layers with a window, where these have pages of their own. Pages before a window may be any.
    window_slots: Tensor | None = None
    window_table: Tensor | None = None

    def of(self, weights: LayerWeights) -> Rows:
        """The rows as a layer takes them: a layer with a window where its own pages are."""
        if not weights.window or self.window_slots is None or self.window_table is None:
            return self
        return Rows(self.positions, self.row_sequence, self.window_slots, self.window_table)


class BlockRows(NamedTuple):
    """Blocks of γ draft slots, sequence r's at positions anchor … anchor + γ − 1. Row r·γ + i is slot i."""

    anchor_positions: Tensor  # [R] int64
    page_table: Tensor  # [R, P] int64, −1 padded
    block_size: int  # γ
