"""DSpark's context: target features to the keys and values of every drafter layer, in one call."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels import layer_frame as f
from kernels.jit import routine
from kernels.layer_products import multiply_stage, norm_stage
from kernels.matmul import matmul, reserve_scratch
from kernels.rms_norm import rms_norm
from kernels.simd import load_double
from kernels.store_kv import store_context_kv, store_row
from kernels.threads import claim, finish, get_threads, run
from kernels.values import PAGE, LayerCache, PackedMatrix, RopeTable, double_bits

STAGES = 5
# Words of the frame; the first is the counters'.
THREADS, ROWS, FEATURES, WIDTH, _FC, _FC_FORM, _HIDDEN, _PROJECTED = range(1, 9)
_NORM, _EPS, _NORMED, _KV_W, _KV_FORM, _KV_WIDTH, _KV = range(9, 16)
_LAYERS, _KV_HEADS, _HEAD_DIM, _K_NORMS, _CACHES, _COS, _SIN, POSITIONS, SLOTS = range(16, 25)
_SCRATCH, _SCRATCH_SIZE, _ANGLES, _LIMIT, OUTSIDE = range(25, 30)


@dataclass(frozen=True, slots=True)
class ContextWeights:
    """What turns a feature into context: hidden = rms_norm(fc · feature), then k and v of all layers at once."""

    fc: PackedMatrix  # [H, F]
    norm: Tensor  # [H]
    kv: PackedMatrix  # [layers · 2 · kv_heads · D, H], k|v layer by layer
    k_norms: Tensor  # [layers, D]
    eps: float
    caches: tuple[LayerCache, ...]
    words: np.ndarray = field(init=False, repr=False, compare=False)  # addresses of the caches
    address: int = field(init=False, repr=False, compare=False)  # of words
    eps_bits: int = field(init=False, repr=False, compare=False)
    native: bool = field(init=False, repr=False, compare=False)  # whether native code applies

    def __post_init__(self) -> None:
        first = self.caches[0]
        if any(cache.k.shape != first.k.shape for cache in self.caches):
            raise ValueError("the layers' caches differ in shape")
        wanted = len(self.caches) * 2 * first.kv_heads * first.head_dim
        if (self.kv.n, self.kv.k) != (wanted, self.fc.n) or self.k_norms.shape != (len(self.caches), first.head_dim):
            raise ValueError("fc, kv, k_norms and the caches do not fit together")
        vectors = (self.norm, self.k_norms)
        native = all(v.dtype == torch.float32 and v.is_cpu and v.is_contiguous() for v in vectors)
        native = native and all(m.address for m in (self.fc, self.kv)) and all(c.address for c in self.caches)
        object.__setattr__(self, "native", native and first.head_dim % 32 == 0 and first.head_dim <= 512)
        object.__setattr__(self, "words", np.array([cache.address for cache in self.caches], np.int64))
        object.__setattr__(self, "address", self.words.ctypes.data)
        object.__setattr__(self, "eps_bits", double_bits(self.eps))


def store_context(features: Tensor, weights: ContextWeights, rope: RopeTable, positions: Tensor, slots: Tensor) -> None:
    """Write the context keys and values of features [T, F] to slots [T], at positions [T].

    Raises:
        ValueError: tensors that do not fit together, a position outside the rope table, a slot outside a cache.
    """
    if not weights.native or features.dtype != torch.float32 or not features.is_cpu:
        hidden = rms_norm(matmul(features, weights.fc), weights.norm, weights.eps)
        kv = matmul(hidden, weights.kv)
        store_context_kv(kv, weights.k_norms, weights.caches, rope, positions, slots, weights.eps)
        return
    rows, width = features.shape
    if width != weights.fc.k or rope.cos.shape[1] * 2 != weights.caches[0].head_dim:
        raise ValueError("the features do not fit fc, or the rope table does not fit the heads")
    for tensor in (positions, slots):
        if tensor.dtype != torch.int64 or not tensor.is_contiguous() or len(tensor) != rows:
            raise ValueError("positions and slots must be contiguous int64, one a row")
    if not features.is_contiguous():
        features = features.contiguous()
    frame, _ = lay_context(rows, weights, rope)
    frame[FEATURES] = features.data_ptr()
    frame[POSITIONS], frame[SLOTS] = positions.data_ptr(), slots.data_ptr()
    run(store_frame(), frame.buffer_info()[0], STAGES)
    refuse(frame[OUTSIDE])


def refuse(outside: int) -> None:
    """Raises ValueError if a run left this in its frame."""
    if outside:
        raise ValueError("a position lies outside the rope table, or a slot outside the cache")


def lay_context(
    rows: int, weights: ContextWeights, rope: RopeTable, own: bool = False
) -> tuple[array[int], np.ndarray]:
    """What `store_frame` is told for up to `rows` rows, but for where they lie; and memory of its `own` that it uses.

    Without it that is the calling thread's scratch, for one call.
    """
    width, hidden_size, kv_width, cache = weights.fc.k, weights.fc.n, weights.kv.n, weights.caches[0]
    threads = get_threads()
    rounded = rows * (2 * max(width, hidden_size) + 128) // 64 * 64
    each = f.SPILL + rounded + 64
    shared = [rows * hidden_size * 4 + 64, rows * hidden_size * 4 + 64, rows * kv_width * 4 + 64]
    size = threads * each + sum(shared) + 64
    memory = np.empty(size + 64 if own else 0, np.uint8)
    scratch = (memory.ctypes.data + 63) & -64 if own else reserve_scratch(size)
    projected = scratch + threads * each
    normed = projected + shared[0]
    joined = normed + shared[1]
    words = (
        *(0, threads, rows, 0, width, weights.fc.address, weights.fc.form, hidden_size, projected),
        *(weights.norm.data_ptr(), weights.eps_bits, normed, weights.kv.address, weights.kv.form, kv_width, joined),
        *(len(weights.caches), cache.kv_heads, cache.head_dim, weights.k_norms.data_ptr(), weights.address),
        *(*rope.words, 0, 0, scratch, each),
        *(rope.cos.shape[0], cache.pages * PAGE, 0),
    )
    return array("q", words), memory


@routine
def store_frame(frame, worker):
    counters, threads, rows = f.word(frame, 0), f.word(frame, THREADS), f.word(frame, ROWS)
    width, hidden, kv_width = f.word(frame, WIDTH), f.word(frame, _HIDDEN), f.word(frame, _KV_WIDTH)
    eps = load_double(frame + 8 * _EPS)
    scratch = f.word(frame, _SCRATCH) + worker * f.word(frame, _SCRATCH_SIZE)
    for row in range(rows):  # every thread for itself
        position, slot = f.word(f.word(frame, POSITIONS), row), f.word(f.word(frame, SLOTS), row)
        if position < 0 or position >= f.word(frame, _ANGLES) or slot < 0 or slot >= f.word(frame, _LIMIT):
            f.store_word(frame, OUTSIDE, 1)
            return
    multiply_stage(
        counters, 0, threads, rows, f.word(frame, FEATURES), width * 4, f.word(frame, _FC), f.word(frame, _FC_FORM),
        hidden, width, f.word(frame, _PROJECTED), hidden * 4, 0, 0, scratch,
    )  # fmt: skip
    projected, normed = f.word(frame, _PROJECTED), f.word(frame, _NORMED)
    norm_stage(frame, 1, rows, projected, 0, f.word(frame, _NORM), eps, normed, hidden, 0, 0)
    multiply_stage(
        counters, 2, threads, rows, f.word(frame, _NORMED), hidden * 4, f.word(frame, _KV_W), f.word(frame, _KV_FORM),
        kv_width, hidden, f.word(frame, _KV), kv_width * 4, 0, 0, scratch,
    )  # fmt: skip
    done, row = 0, claim(counters, 3, -1)
    while row < rows:
        store_row(
            f.word(frame, _KV) + row * kv_width * 4,
            f.word(f.word(frame, POSITIONS), row),
            f.word(f.word(frame, SLOTS), row),
            f.word(frame, _LAYERS),
            f.word(frame, _KV_HEADS),
            f.word(frame, _HEAD_DIM),
            f.word(frame, _K_NORMS),
            f.word(frame, _CACHES),
            f.word(frame, _COS),
            f.word(frame, _SIN),
            eps,
            scratch,
        )
        done, row = done + 1, claim(counters, 3, row)
    finish(counters, 3, done, rows)
