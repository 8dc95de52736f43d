"""Where a drafter's weights begin, other than in noise: its target's last layers, and bigrams of the data.

From noise, a drafter spends its first hundreds of steps on what the target's weights and a count of neighbouring
tokens say already.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.training.folding import Beginning, folded
from engine.training.gemma3 import Gemma3, Target
from engine.training.model import DecoderLayer
from engine.training.settings import SettingsError
from engine.training.sources import Stream

_PART = 2**24  # pairs counted at once
_DOUBT, _LEAST = 6e-6, 10.0  # see bigram_factors


def last_layers(
    target: Target, count: int, streams: Sequence[Stream], shares: Sequence[float], scaled: bool
) -> Beginning:
    """The target's last `count` layers, in order, and its final norm; those of another family folded into Qwen3's form.

    Args:
        streams, shares: what will be trained on: folding measures the target there.
        scaled: whether the drafter reads channels in units of their sizes, as folded layers do and others do not.

    Raises:
        SettingsError: it has fewer, or `scaled` is not what they need.
    """
    layers = list(target.model.layers)
    if count > len(layers) - 1:
        raise SettingsError(
            f"model.init=target: {count} layers cannot begin as the last of the target's {len(layers)}; "
            "give fewer model.layers, or another init"
        )
    if scaled != isinstance(target, Gemma3):
        need = "true" if not scaled else "false"
        raise SettingsError(f"model.init=target: this target's layers need model.channel_scale={need}; or another init")
    if isinstance(target, Gemma3):
        return folded(target, count, streams, shares)
    found = [layer for layer in layers[len(layers) - count :] if isinstance(layer, DecoderLayer)]
    return Beginning(found, target.model.norm.weight)


def bigram_factors(
    streams: Sequence[Stream], shares: Sequence[float], vocabulary: int, rank: int, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Low-rank factors of how much likelier a token is after another than anywhere.

    W2·W1[a] approximates log(1 + P(a, b) / (κ·P(b))), which is log P(b|a) − log P(b), smoothed towards 0, up to a
    constant of a's that no softmax sees; pairs that never occur are 0, so that the table is as sparse as the data.
    κ = max(6e-6, 10 / pairs): about the pairs that chance alone would make. The approximation is the best in squares
    weighted by √(P(a)·P(b)), by a randomised singular value decomposition (Halko et al. 2011).

    Args:
        shares: each source's share of the training rows.
        rank: r.
        ids: target ids [N] that may be drafted; None: all.

    Returns:
        (W1 [V, r], W2 [N, r]), fp32. Directions beyond the table's rank are noise of 0.02.
    """
    key, joint, total = _pairs(streams, shares, vocabulary)
    first, second = np.divmod(key, vocabulary)
    floor = 1.0 / max(vocabulary, total)
    before = np.bincount(first, joint, minlength=vocabulary) + floor
    after = np.bincount(second, joint, minlength=vocabulary) + floor
    surprise = np.log1p(joint / (max(_DOUBT, _LEAST / total) * after[second]))
    rows, columns = (torch.from_numpy(np.sqrt(share)).float() for share in (before, after))
    values = torch.from_numpy(surprise).float() * rows[first] * columns[second]
    places = torch.from_numpy(np.stack((first, second)))
    table = torch.sparse_coo_tensor(places, values, (vocabulary, vocabulary), check_invariants=True)
    if ids is not None:
        table, columns = table.index_select(1, ids.cpu()), columns[ids.cpu()]
    kept = min(rank, *table.shape)
    left, strength, right = torch.svd_lowrank(table.coalesce(), q=kept, niter=4)
    w1, w2 = torch.randn(vocabulary, rank) * 0.02, torch.randn(len(columns), rank) * 0.02
    w1[:, :kept] = left * strength.sqrt() / rows[:, None]
    w2[:, :kept] = right * strength.sqrt() / columns[:, None]
    return w1, w2


def _pairs(streams: Sequence[Stream], shares: Sequence[float], vocabulary: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(a·V + b, increasing; its share of all pairs as training meets them; pairs counted)."""
    keys, weights, total = [], [], 0
    for stream, share in zip(streams, shares, strict=True):
        mine, counts = [], []
        for at in range(0, len(stream.tokens) - 1, _PART):
            tokens = np.asarray(stream.tokens[at : at + _PART + 1]).astype(np.int64)
            pairs = tokens[:-1] * vocabulary + tokens[1:]
            if stream.asked is not None:
                pairs = pairs[np.asarray(stream.asked[at + 1 : at + len(tokens)])]
            part, count = np.unique(pairs, return_counts=True)
            mine.append(part)
            counts.append(count)
        count = np.concatenate(counts)
        total += int(count.sum())
        keys.append(np.concatenate(mine))
        weights.append(count * (share / sum(shares) / max(1, count.sum())))
    key, place = np.unique(np.concatenate(keys), return_inverse=True)
    return key, np.bincount(place, np.concatenate(weights), minlength=len(key)), max(1, total)
