"""Drafted blocks in the host's memory: where native code reads them, and room that serves round after round."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels.draft_head import HeadWeights
from kernels.layer_run import roomy
from kernels.markov_sample import DraftSample, sample_words


class HostDraft(NamedTuple):
    """A drafted block as native code reads it, which asks no tensor for its address: that costs more than reading."""

    tokens: np.ndarray  # [D, γ] int64
    confidences: int  # address of [D, γ] float32; 0 without them
    words: tuple[int, ...]  # address of the tokens, D, γ; of logits [D', γ, V], D', γ; of log_z [D', γ]
    held: tuple[object, ...] = ()  # what lies there


NO_TOKENS = np.zeros((0, 0), np.int64)
NO_DRAFT = HostDraft(NO_TOKENS, 0, (0,) * 7)


def host_draft(tokens: torch.Tensor, logits: torch.Tensor | None, log_z: torch.Tensor | None) -> HostDraft:
    """Of tensors on the CPU; what has gaps or another type is copied."""
    drafted = np.ascontiguousarray(tokens.numpy(), np.int64)
    if logits is None or log_z is None:
        return HostDraft(drafted, 0, (drafted.ctypes.data, *drafted.shape, 0, 0, 0, 0))
    kept, sums = (np.ascontiguousarray(part.numpy(), np.float32) for part in (logits, log_z))
    words = (drafted.ctypes.data, *drafted.shape, kept.ctypes.data, *kept.shape[:2], sums.ctypes.data)
    return HostDraft(drafted, 0, words, (kept, sums))


class DraftRoom:
    """Memory that blocks are drawn into; what stood there before is lost.

    After a forward pass nothing of the host's code is in the caches, and even small tensors are dear to make anew.

    Args:
        width: tokens that the head gives logits for.
    """

    def __init__(self, head: HeadWeights, width: int) -> None:
        self._vocabulary = width if head.ids is None else head.vocabulary
        self._has_confidence = head.confidence_weight is not None
        self._room = 0  # tokens
        self._logits = torch.empty(0)
        self._samples: dict[tuple[int, int, bool], tuple[DraftSample, HostDraft, tuple[int, ...]]] = {}

    def sample(self, count: int, block: int, rejection: bool) -> tuple[DraftSample, HostDraft, tuple[int, ...]]:
        """Room for so many blocks, with logits where a row needs them, and the words that name it to the kernel."""
        found = self._samples.get((count, block, rejection))
        return self._view(count, block, rejection) if found is None else found

    def _view(self, count: int, block: int, rejection: bool) -> tuple[DraftSample, HostDraft, tuple[int, ...]]:
        size = count * block
        if size > self._room:
            self._room = roomy(size)
            self._samples.clear()
            self._tokens = torch.empty(self._room, dtype=torch.int64)
            self._log_z, self._confidence = torch.empty(self._room), torch.empty(self._room)
            self._logits = torch.empty(0)
        if rejection and not len(self._logits):
            self._samples.clear()
            self._logits = torch.empty(self._room, self._vocabulary)
        tokens, log_z = self._tokens[:size].view(count, block), self._log_z[:size].view(count, block)
        logits = self._logits[:size].view(count, block, self._vocabulary) if rejection else None
        confidence = self._confidence[:size].view(count, block) if self._has_confidence else None
        sample = DraftSample(tokens, logits, log_z, confidence)
        host = host_draft(tokens, logits, None if logits is None else log_z)
        host = host._replace(confidences=0 if confidence is None else confidence.data_ptr())
        found = sample, host, sample_words(sample)
        self._samples[count, block, rejection] = found
        return found
