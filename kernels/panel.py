"""Matrix-vector products for the sequential draft head: packed W2, and dot products, in one fixed order.

`pack` stores W2 [V, r] as panels of 128 tokens, uint32 [panels, r, 64] when bfloat16 holds every value (two tokens a
word) and float32 [panels, r, 128] when not. Every token is one chain of fused multiply-adds over k = 0 … r − 1, so its
logit depends on nothing but its own row. The inner loop is written in LLVM vectors so that the sums stay in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.jit import native
from kernels.vector import relaxed

PANEL = 128
_LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_WORDS = ir.VectorType(ir.IntType(32), _LANES)


def pack(w2: torch.Tensor) -> np.ndarray:
    """W2 [V, r] as panels, zero-padded to whole ones; aligned to cache lines."""
    vocabulary, rank = w2.shape
    panels = -(-vocabulary // PANEL)
    padded = torch.zeros((panels * PANEL, rank), dtype=torch.float32)
    padded[:vocabulary] = w2.float()
    values = padded.view(panels, PANEL, rank).transpose(1, 2).contiguous()
    if not torch.equal(values, values.bfloat16().float()):
        return _aligned(values.numpy())
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    halves = bits.reshape(panels, rank, PANEL // 32, 2, _LANES)
    words = halves[:, :, :, 0] | (halves[:, :, :, 1] << 16)
    return _aligned(words.reshape(panels, rank, PANEL // 2))


def _aligned(values: np.ndarray) -> np.ndarray:
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    out = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


@intrinsic  # type: ignore[untyped-decorator]
def _panel_dot(typing_context: Any, panel: Any, features: Any, out: Any, rank: Any) -> Any:
    """out[0:128] = Σ_k features[k] · panel[k]; `panel` holds uint32 pairs or float32, 64-byte aligned."""
    packed = panel.dtype == types.uint32

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, vector, target = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
        )
        count = arguments[3]
        index = ir.IntType(64)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{_LANES}f32"
        )
        sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(PANEL // _LANES)]
        for cell in sums:
            builder.store(ir.Constant(_FLOATS, [0.0] * _LANES), cell)
        loads = PANEL // _LANES // (2 if packed else 1)
        lane_type = _WORDS if packed else _FLOATS
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        shift = ir.Constant(_WORDS, [16] * _LANES)
        mask = ir.Constant(_WORDS, [0xFFFF0000] * _LANES)
        with cgutils.for_range(builder, count, intp=index) as loop:
            scalar = builder.load(builder.gep(vector, [loop.index]))
            first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
            feature = builder.shuffle_vector(first, undefined, zeros)
            base = builder.mul(loop.index, ir.Constant(index, loads * _LANES))
            for load in range(loads):
                offset = builder.add(base, ir.Constant(index, load * _LANES))
                address = builder.bitcast(builder.gep(source, [offset]), lane_type.as_pointer())
                loaded = builder.load(address, align=64)
                weights = [loaded]
                if packed:
                    weights = [
                        builder.bitcast(builder.shl(loaded, shift), _FLOATS),
                        builder.bitcast(builder.and_(loaded, mask), _FLOATS),
                    ]
                for half, weight in enumerate(weights):
                    cell = sums[load * len(weights) + half]
                    builder.store(builder.call(fma, [feature, weight, builder.load(cell)]), cell)
        for block, cell in enumerate(sums):
            address = builder.gep(target, [ir.Constant(index, block * _LANES)])
            builder.store(builder.load(cell), builder.bitcast(address, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(panel, features, out, types.int64), generate


@native
def panel_product(panels: np.ndarray, features: np.ndarray, out: np.ndarray) -> None:
    """out [panels · 128] = W2 · features [r], float32."""
    rank = features.shape[0]
    for p in range(panels.shape[0]):
        _panel_dot(panels[p], features, out[p * PANEL :], rank)


@relaxed
def dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Σ a·b of two float32 vectors."""
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total
