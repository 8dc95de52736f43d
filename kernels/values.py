"""The values that the forward-pass ops share. Tensors are never copied here; every shape is checked once.

A page holds `PAGE` token slots. Inside a page keys lie transposed, [head_dim, PAGE], so that the scores of a
page's keys accumulate as one vector over head_dim; values lie as they are, [PAGE, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PAGE = 16  # slots a page; a slot is page · PAGE + offset
PANEL = 32  # columns a panel of a packed matrix
FULL, HALVED, PAIRED = range(3)  # forms of a panel, see PackedMatrix


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight y = x Wᵀ, W [N, K], in the layout that its device and dtype multiply fastest.

    Exactly one of `weight` and `panels` is set. Panel p holds W[32p : 32p + 32], k by k; missing rows are zero.
    FULL panels are float32 [N/32, K, 32]. HALVED ones serve float32 weights whose every entry is a bfloat16: int32
    [N/32, K, 16], the low half of lane j being row 32p + j and the high half row 32p + 16 + j; widening is exact,
    so both give the same bits. PAIRED ones serve bfloat16 products, which round x to bfloat16 as well and sum in
    float32: int32 [N/32, K/2, 32], lane j being row 32p + j, its low half at 2k and its high half at 2k + 1.
    """

    n: int
    k: int
    weight: Tensor | None  # [N, K]
    panels: Tensor | None
    form: int = FULL
    address: int = field(init=False, repr=False, compare=False)  # of the panels; 0 where there are none

    def __post_init__(self) -> None:
        if (self.weight is None) == (self.panels is None):
            raise ValueError("a packed matrix holds either a weight or panels")
        object.__setattr__(self, "address", self.panels.data_ptr() if self.panels is not None else 0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.weight is None else self.weight.dtype

    @property
    def device(self) -> torch.device:
        held = self.panels if self.weight is None else self.weight
        assert held is not None
        return held.device

    def dense(self) -> Tensor:
        """The weight as [N, K]; unpacks a copy when only panels are held."""
        if self.weight is not None:
            return self.weight
        assert self.panels is not None
        columns = self.panels
        if self.form != FULL:
            low, high = (half.view(torch.float32) for half in (self.panels << 16, self.panels & -65536))
            columns = torch.cat([low, high], 2) if self.form == HALVED else torch.stack([low, high], 2).flatten(1, 2)
        return columns.transpose(1, 2).flatten(0, 1)[: self.n, : self.k]


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary angles of every position: `cos` and `sin` [L, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


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


def cache_shapes(pages: int, kv_heads: int, head_dim: int, paired: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a LayerCache's k and v."""
    if paired:
        return (pages, kv_heads, head_dim // 2, PAGE, 2), (pages, kv_heads, PAGE // 2, head_dim, 2)
    return (pages, kv_heads, head_dim, PAGE), (pages, kv_heads, PAGE, head_dim)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One pre-norm transformer layer: attention with q/k norms and rope, then SwiGLU.

    `qkv` stacks the rows of q, k and v; `gate_up` those of gate and up.
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
        entries = self._describe()
        object.__setattr__(self, "words", np.array(entries, np.int64))
        object.__setattr__(self, "address", self.words.ctypes.data if entries else 0)

    @property
    def hidden(self) -> int:
        return self.input_norm.shape[0]

    @property
    def intermediate(self) -> int:
        return self.down.k

    def _describe(self) -> list[int]:
        """Addresses and sizes in the order of `kernels.layer_frame`; empty where native code does not apply."""
        matrices = (self.qkv, self.o, self.gate_up, self.down)
        vectors = [self.input_norm, self.q_norm, self.k_norm, self.post_norm]
        if self.qkv_bias is not None:
            vectors.append(self.qkv_bias)
        if not all(matrix.address for matrix in matrices) or self.head_dim % 32 or self.head_dim > 512:
            return []
        if any(v.dtype != torch.float32 or v.device.type != "cpu" or not v.is_contiguous() for v in vectors):
            return []
        entries = [self.hidden, self.intermediate, self.heads, self.kv_heads, self.head_dim]
        entries += [int(np.float64(self.eps).view(np.int64))]
        entries += [v.data_ptr() for v in vectors[:4]]
        entries += [self.qkv_bias.data_ptr() if self.qkv_bias is not None else 0]
        for matrix in matrices:
            entries += [matrix.address, matrix.form]
        return entries


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Layers that run one after the other, each over its own cache."""

    layers: tuple[LayerWeights, ...]
    caches: tuple[LayerCache, ...]
    words: np.ndarray = field(init=False, repr=False, compare=False)  # addresses: layer, cache, layer, cache, …
    shape: tuple[int, ...] = field(init=False, repr=False, compare=False)  # see __post_init__
    native: bool = field(init=False, repr=False, compare=False)  # whether native code applies

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.caches):
            raise ValueError(f"{len(self.layers)} layers do not go with {len(self.caches)} caches")
        pairs = [(layer.address, cache.address) for layer, cache in zip(self.layers, self.caches, strict=True)]
        first, widest = self.layers[0], max(layer.intermediate for layer in self.layers)
        shape = (first.hidden, first.heads, first.kv_heads, first.head_dim, widest, self.caches[0].k.dtype.itemsize)
        object.__setattr__(self, "words", np.array(pairs, np.int64).flatten())
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "native", all(layer and cache for layer, cache in pairs))


@dataclass(frozen=True, slots=True)
class Ends:
    """What stands before and behind a model's layers."""

    embedding: Tensor  # [V, H]
    norm: Tensor  # [H]
    eps: float
    head: PackedMatrix  # [V, H], or the rows of a reduced draft vocabulary
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
        eps = int(np.float64(self.eps).view(np.int64))
        words = (table.data_ptr(), table.dtype.itemsize, head.n, norm.data_ptr(), eps, head.address, head.form)
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "native", native)


@dataclass(frozen=True, slots=True)
class Rows:
    """The flat rows of a ragged batch, and where their keys and values lie. R sequences, T rows."""

    positions: Tensor  # [T] int64
    row_sequence: Tensor  # [T] int64: which row of page_table
    slots: Tensor  # [T] int64: page · PAGE + offset
    page_table: Tensor  # [R, P] int64, −1 padded: page of positions PAGE·j … PAGE·j + PAGE − 1


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Blocks of γ draft slots, sequence r's at positions anchor … anchor + γ − 1. Row r·γ + i is slot i."""

    anchor_positions: Tensor  # [R] int64
    page_table: Tensor  # [R, P] int64, −1 padded
    block_size: int  # γ
