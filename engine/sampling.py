"""Requests' sampling options as arrays for the kernels."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from engine.types import Sequence, Verification
from kernels.filters import SamplingRows


def sampling_rows(sequences: Rows[Sequence], device: torch.device) -> SamplingRows:
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
