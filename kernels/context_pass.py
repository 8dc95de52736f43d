"""The context of a round's kept rows in one call from Python. See `kernels.draft_pass` for why."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from array import array

import numpy as np
from torch import Tensor

from kernels import context as c
from kernels import layer_frame as f
from kernels.context import ContextWeights, lay_context, refuse, store_frame
from kernels.jit import entry
from kernels.layer_products import copy_floats
from kernels.layer_run import roomy
from kernels.threads import get_threads, run_team, team_and
from kernels.values import RopeTable


class ContextPass:
    """`kernels.context.store_context` for the first rows of each request of a round that native code laid out."""

    def __init__(self, weights: ContextWeights, rope: RopeTable) -> None:
        self.weights, self.rope = weights, rope
        self._room = self._threads = 0  # rows, and what shares them out, that was prepared for
        self._frame, self._memory, self._gathered = array("q"), np.empty(0), np.empty(0)

    @staticmethod
    def applies(weights: ContextWeights, rope: RopeTable) -> bool:
        return weights.native and rope.cos.shape[1] * 2 == weights.caches[0].head_dim

    def __call__(self, features: Tensor, laid: np.ndarray, total: int, counts: list[int]) -> None:
        """Write what features [total, F] float32 become of the rows in `laid` (`kernels.layout.lay`), all of which have
        logits; the first counts[r] of each request.

        Raises:
            ValueError: as `store_context`.
        """
        if total > self._room or get_threads() != self._threads:
            self._room, self._threads = max(self._room, roomy(total)), get_threads()
            self._frame, self._memory = lay_context(self._room, self.weights, self.rope, own=True)
            self._gathered = np.empty(self._room * (self.weights.fc.k * 4 + 16) + 64, np.uint8)
        kept = array("q", counts)
        rows = (features.data_ptr(), laid, total, kept.buffer_info()[0], len(counts), self._gathered)
        refuse(_absorb(*team_and(store_frame), self._frame.buffer_info()[0], *rows))


@entry
def _absorb(team, routine, frame, features, laid, total, counts, requests, room):
    """Whether a row lies outside."""
    width = f.word(frame, c.WIDTH) * 4
    at = laid.ctypes.data
    positions, slots, offsets = at + 8 * total, at + 24 * total, at + 32 * total
    rows, in_front = 0, True
    for request in range(requests):
        in_front = in_front and f.word(offsets, request) == rows
        rows += f.word(counts, request)
    if rows == 0:
        return 0
    if not in_front:
        gathered = (room.ctypes.data + 63) & -64
        own_positions = gathered + rows * width
        own_slots = own_positions + 8 * rows
        rows = 0
        for request in range(requests):
            first = f.word(offsets, request)
            for row in range(first, first + f.word(counts, request)):
                copy_floats(features + row * width, gathered + rows * width, width // 4)
                f.store_word(own_positions, rows, f.word(positions, row))
                f.store_word(own_slots, rows, f.word(slots, row))
                rows += 1
        features, positions, slots = gathered, own_positions, own_slots
    f.store_word(frame, c.ROWS, rows)
    f.store_word(frame, c.FEATURES, features)
    f.store_word(frame, c.POSITIONS, positions)
    f.store_word(frame, c.SLOTS, slots)
    f.store_word(frame, c.OUTSIDE, 0)
    run_team(team, routine, frame, c.STAGES)
    return f.word(frame, c.OUTSIDE)
