"""Requests' sampling options as arrays for the kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from engine.types import Sequence, Verification
from kernels.filters import SamplingRows


@lru_cache(maxsize=4)  # the same sequences decode together for many rounds, and their options never change
def sampling_rows(sequences: tuple[Sequence, ...], device: torch.device) -> SamplingRows:
    """One row a sequence."""
    options = [sequence.request.sampling for sequence in sequences]
    return SamplingRows.build(
        temperature=[o.temperature for o in options],
        top_k=[o.top_k for o in options],
        top_p=[o.top_p for o in options],
        min_p=[o.min_p for o in options],
        seed=[s.seed for s in sequences],
        coupled=[s.verification is Verification.COUPLED for s in sequences],
        device=device,
    )
