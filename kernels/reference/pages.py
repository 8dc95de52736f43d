"""Reading, writing and attending to K/V pages in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.values import PAGE, BlockRows, LayerCache, Rows


def write_slots(cache: LayerCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store k and v [T, kv_heads, D] in the slots [T]."""
    pages, offsets = slots // PAGE, slots % PAGE
    k, v = k.to(cache.k.dtype), v.to(cache.v.dtype)
    if cache.paired:
        cache.k[pages, :, :, offsets] = k.unflatten(2, (-1, 2))
        cache.v[pages, :, offsets // 2, :, offsets % 2] = v
    else:
        cache.k[pages, :, :, offsets] = k
        cache.v[pages, :, offsets, :] = v


def read_prefix(cache: LayerCache, page_row: Tensor, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """The keys and values [length − first, kv_heads, D] of positions first … length−1, given a row [P] of page ids.

    Args:
        first: a page's first position.
    """
    pages = page_row[first // PAGE : (length + PAGE - 1) // PAGE]
    length -= first
    k, v = cache.k[pages], cache.v[pages]
    if cache.paired:
        k, v = k.transpose(3, 4).flatten(2, 3), v.transpose(3, 4).flatten(2, 3)
    k = k.permute(0, 3, 1, 2).flatten(0, 1)
    v = v.permute(0, 2, 1, 3).flatten(0, 1)
    return k[:length], v[:length]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention of q [T, heads, D] over k, v [S, kv_heads, D] -> [T, heads · D].

    `visible` [T, S] is True where a row may look; None lets every row see every key. Scores and sums are
    float32 at least.
    """
    rows, heads, head_dim = q.shape
    if k.dtype == torch.bfloat16:
        q = q.bfloat16().to(q.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    group = heads // k.shape[1]
    q_wide = q.to(wide).reshape(rows, k.shape[1], group, head_dim)
    scores = torch.einsum("thgd,shd->hgts", q_wide, k.to(wide)) * head_dim**-0.5
    if visible is not None:
        scores = torch.where(visible, scores, torch.tensor(-torch.inf, dtype=wide, device=q.device))
    out = torch.einsum("hgts,shd->thgd", scores.softmax(-1), v.to(wide))
    return out.reshape(rows, heads * head_dim).to(q.dtype)


def paged_attention(q: Tensor, cache: LayerCache, rows: Rows, window: int = 0) -> Tensor:
    """Causal attention of q [T, heads, D] over the pages of each row's sequence -> [T, heads · D].

    Row t sees positions max(0, p − window + 1) … p, p its own; window 0 is no window.
    """
    out = torch.empty_like(q).flatten(1)
    for sequence in rows.row_sequence.unique().tolist():
        mine = (rows.row_sequence == sequence).nonzero().flatten()
        positions = rows.positions[mine][:, None]
        length = int(positions.max()) + 1
        start = max(int(positions.min()) + 1 - window, 0) // PAGE * PAGE if window else 0  # pages before it may be gone
        keys, values = read_prefix(cache, rows.page_table[sequence], length, start)
        index = torch.arange(start, length, device=q.device)
        visible = (index <= positions) & ((index > positions - window) | (window == 0))
        out[mine] = attend(q[mine], keys, values, visible)
    return out


def block_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, block: BlockRows) -> Tensor:
    """Attention of draft blocks, q [R·γ, heads, D] and k, v [R·γ, kv_heads, D] -> [R·γ, heads · D].

    A slot sees its block's whole context, positions 0 … anchor−1 in the cache, and all γ slots, both ways.
    """
    out = torch.empty_like(q).flatten(1)
    size = block.block_size
    for r, anchor in enumerate(block.anchor_positions.tolist()):
        mine = slice(r * size, (r + 1) * size)
        keys, values = read_prefix(cache, block.page_table[r], anchor)
        keys = torch.cat([keys, k[mine].to(keys.dtype)])  # what the cache would hold
        values = torch.cat([values, v[mine].to(values.dtype)])
        out[mine] = attend(q[mine], keys, values, None)
    return out
