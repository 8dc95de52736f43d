"""The tokens that a drafter may draft: all of the target's, or the most frequent ones of the training data.

Logits cost V values a slot, and a Markov head reads its W2 once a slot: of a vocabulary of 152 k to 262 k, a fifth of
the tokens covers nearly all text. The map is stored with the drafter as EAGLE-3 publishes it (`d2t`, `t2d`,
`draft_vocab_size`, see `engine.drafters.attachment`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.training.settings import SettingsError
from engine.training.sources import Stream

NO_GOAL = -100  # the draft id of a token that has none: its cross-entropy is 0
_PART = 2**24  # tokens counted at once


class DraftVocabulary:
    """Which target ids may be drafted, in draft order.

    Args:
        vocabulary: V, the target's.
        ids: target ids [N], N < V; None for all.
    """

    def __init__(self, vocabulary: int, ids: Tensor | None = None) -> None:
        self.vocabulary, self.ids = vocabulary, ids
        self._draft_id = torch.empty(0, dtype=torch.int64)
        if ids is not None:
            self._draft_id = torch.full((vocabulary,), NO_GOAL).scatter_(0, ids.cpu(), torch.arange(len(ids)))

    @property
    def size(self) -> int | None:
        """N, or None for the whole vocabulary."""
        return None if self.ids is None else len(self.ids)

    def rows_of(self, head: Tensor) -> Tensor:
        """The rows [N, D] of the target's head [V, D] that may be drafted."""
        return head if self.ids is None else head[self.ids.to(head.device)]

    def on(self, device: torch.device) -> Tensor | None:
        """The ids on a device."""
        return None if self.ids is None else self.ids.to(device)

    def goals(self, tokens: Tensor) -> Tensor:
        """Draft ids of target ids; `NO_GOAL` where there is none."""
        return tokens if self.ids is None else self._draft_id.to(tokens.device)[tokens]

    def maps(self) -> dict[str, Tensor]:
        """`d2t` and `t2d` as checkpoints store them; nothing for the whole vocabulary."""
        if self.ids is None:
            return {}
        return {"d2t": self.ids.cpu() - torch.arange(len(self.ids)), "t2d": self._draft_id >= 0}

    def keys(self) -> dict[str, Any]:
        """What config.json says about it."""
        return {} if self.ids is None else {"draft_vocab_size": len(self.ids)}


def most_frequent(
    streams: Sequence[Stream], shares: Sequence[float], count: int, vocabulary: int
) -> tuple[Tensor, float]:
    """The `count` tokens asked for most often, as training meets the sources.

    Args:
        shares: each source's share of the training rows.

    Returns:
        (target ids [count], increasing; the share of asked tokens that they cover).

    Raises:
        SettingsError: not a part of the vocabulary.
    """
    if not 0 < count < vocabulary:
        raise SettingsError(f"model.draft_vocab {count} must lie in 1 … {vocabulary - 1}; 0 lets all be drafted")
    seen = np.zeros(vocabulary)
    for stream, share in zip(streams, shares, strict=True):
        counts = np.zeros(vocabulary)
        for at in range(0, len(stream.tokens), _PART):
            tokens = np.asarray(stream.tokens[at : at + _PART]).astype(np.int64)
            if stream.asked is not None:
                tokens = tokens[np.asarray(stream.asked[at : at + _PART])]
            counts += np.bincount(tokens, minlength=vocabulary)
        seen += share * counts / max(1.0, counts.sum())
    chosen = np.sort(np.argsort(-seen, kind="stable")[:count])
    return torch.from_numpy(chosen), float(seen[chosen].sum() / max(seen.sum(), 1e-12))


def read_ids(path: Path, vocabulary: int) -> Tensor:
    """The target ids of a draft vocabulary, increasing, int64.

    Raises:
        SettingsError: no readable list of distinct ids of the vocabulary; names the file.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SettingsError(f"draft_ids {path} is not a readable .npy file: {error}") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not len(ids):
        raise SettingsError(f"draft_ids {path} must hold one list of whole numbers")
    found = np.unique(ids.astype(np.int64))
    if len(found) < len(ids) or found[0] < 0 or found[-1] >= vocabulary:
        raise SettingsError(f"draft_ids {path} must hold distinct ids in 0 … {vocabulary - 1}")
    return torch.from_numpy(found)
