"""Which prefixes of a round's drafted blocks to verify, given how many tokens in all: the relayed policy's choice."""

from __future__ import annotations

from torch import Tensor

from kernels.device import has_kernels
from kernels.reference import select_lengths as reference


def select_lengths(confidence: Tensor, weights: Tensor, limits: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """The `budget` tokens of highest weighted survival w_r · Π_{i≤j} c[r, i] of R blocks of γ tokens.

    confidence [R, γ] float32 holds calibrated conditional confidences, cut to 0 … 1, NaN being 0; weights [R] float32
    are not negative; limits [R] int64 say how many tokens of a block may be verified; budget [] int64 is how many in
    all. Survivals never rise along a block, so the choice is a prefix of each. Ties go to the earlier position, then
    to the earlier row: no token is looked at, so the choice anticipates nothing if the budget is older than the
    block (DSpark, section on the relayed scheduler; `engine.schedule.lengths.top` is the same on the host).

    Returns lengths [R] int64 and the survivals [R, γ] float32. Nothing waits for the device.

    Raises:
        ValueError: tensors that do not fit together.
    """
    rows = len(confidence)
    if confidence.dim() != 2 or weights.shape != (rows,) or limits.shape != (rows,) or budget.numel() != 1:
        raise ValueError("select_lengths needs confidence [R, γ], weights [R], limits [R] and one budget")
    if has_kernels(confidence):
        from kernels.triton import select_lengths as device

        if device.fits(confidence):
            return device.select_lengths(confidence, weights, limits, budget)
    return reference.select_lengths(confidence, weights, limits, budget)
