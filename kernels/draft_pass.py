"""A block drafter's whole pass in one call from Python: rows laid out, layers, vocabulary head, draft head, sampling.

Between two native calls the host would find nothing in its caches; what is told to the kernels hardly changes from
round to round, so it is kept, with the memory that it speaks of.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import empty

from kernels import layer_frame as f
from kernels import markov_native as m
from kernels.arrays import wholes_at
from kernels.draft_head import HeadWeights
from kernels.filters import SamplingRows
from kernels.host_draft import DraftRoom, HostDraft
from kernels.jit import entry
from kernels.layer_run import grown, holds, lay_frame, refuse, run_frame, scratch_of, stages_of
from kernels.layout import BLOCK_COLUMNS, lay_blocks
from kernels.markov_sample import DraftSample, sample_frame
from kernels.threads import get_threads, one_stage, run_team, team_and
from kernels.values import Ends, LayerStack, RopeTable


@dataclass(slots=True)
class _Prepared:
    """What passes of up to some size are told; everything at an address in it is held here or by the drafter."""

    room: tuple[int, int, int]  # requests, tokens of a block, pages of a request
    threads: int
    base: int  # of the scratch that the layers' frame names
    sampling: SamplingRows
    layers: array[int]
    head: array[int]
    words: tuple[int, int, int, int]  # addresses of rows and both frames, and the layers' number of stages
    held: tuple[Any, ...]


class DraftPass:
    """Drafts blocks with native code throughout.

    Args:
        slots: slots of a block, `first` the one that predicts the first token; behind the anchor stands `mask`.
    """

    def __init__(
        self, ends: Ends, stack: LayerStack, rope: RopeTable, head: HeadWeights, slots: int, mask: int, first: int
    ) -> None:
        self.ends, self.stack, self.rope, self.head = ends, stack, rope, head
        self.slots, self.mask, self.first = slots, mask, first
        self._prepared: _Prepared | None = None
        self._drawn = DraftRoom(head, ends.head.n)

    @staticmethod
    def applies(ends: Ends, stack: LayerStack, rope: RopeTable, head: HeadWeights) -> bool:
        fits = rope.cos.shape[1] * 2 == stack.shape[3] and not stack.windowed and ends.head.k == stack.shape[0]
        return stack.native and ends.native and head.step is None and fits

    def __call__(
        self, given: array[int], count: int, width: int, length: int, sampling: SamplingRows
    ) -> tuple[DraftSample, HostDraft]:
        """Draft `length` tokens for `count` requests; what comes stands until the next call.

        Args:
            given: BLOCK_COLUMNS numbers (kernels.layout) a request.
            width: the most pages of a request.

        Raises:
            ValueError: a page or a position does not exist.
        """
        assert len(given) == count * BLOCK_COLUMNS
        prepared = self._prepared
        if prepared is None or not holds(prepared.room, count, length, width, prepared.threads, prepared.base):
            prepared = self._prepare((count, length, width), sampling)
        if sampling is not prepared.sampling:
            prepared.head[m.TEMPERATURE : m.POSITIONS] = array("q", sampling.addresses)
            prepared.sampling = sampling
        sample, host, outputs = self._drawn.sample(count, length, sampling.any_rejection)
        prepared.head[m.TOKENS :] = array("q", outputs)
        routines = (*team_and(run_frame), sample_frame())
        numbers = (given.buffer_info()[0], count, self.slots, self.mask, self.first, length, width)
        refuse(_draft(*routines, *prepared.words, *numbers))
        return sample, host

    def _prepare(self, wanted: tuple[int, int, int], sampling: SamplingRows) -> _Prepared:
        room = grown((1, self.slots, 1) if self._prepared is None else self._prepared.room, wanted)
        count, length, width = room
        slots, vocabulary, hidden = self.slots, self.ends.head.n, self.stack.shape[0]
        rows = np.empty(count * (3 + slots + width + length), np.int64)
        base, last = empty(count * length, vocabulary), empty(count * length, hidden)
        embedding, item, _, *behind = self.ends.words
        outputs = (0, 0, last.data_ptr(), base.data_ptr(), 0)
        last_words = (0, 1, embedding, item, vocabulary, *behind, *outputs, 0, 0)
        sizes = (self.stack.shape, count * slots, count, width, slots, get_threads())
        angles = self.rope.cos.shape[0] if self.stack.angles is None else min(len(self.rope.cos), self.stack.angles)
        layers = lay_frame(sizes, angles, 0, self.stack, self.rope, (0, 0, 0, 0, 0), (0, 0), last_words)
        wide = vocabulary if self.head.ids is None else self.head.vocabulary
        places = (0, 0, 0, vocabulary, wide, base.data_ptr(), last.data_ptr(), hidden, 0)
        behind_head = (0,) * (m.WORDS - m.POSITIONS)
        head = array("q", (*places, *self.head.words, *sampling.addresses, *behind_head))
        frames = layers.buffer_info()[0], head.buffer_info()[0]
        words = (rows.ctypes.data, *frames, stages_of(len(self.stack.layers)))
        held = (rows, base, last)
        self._prepared = _Prepared(room, sizes[-1], scratch_of(sizes), sampling, layers, head, words, held)
        return self._prepared


@entry
def _draft(
    team, layers, head, rows, layer_frame, head_frame, layer_stages, given, count, slots, mask, first, length, width
):
    """An error of the layers, or 0."""
    numbers = wholes_at(given, count * BLOCK_COLUMNS)
    laid = wholes_at(rows, count * (3 + slots + width + length))
    lay_blocks(numbers, count, slots, mask, first, length, width, laid)
    anchors, positions, proposals = rows, rows + 8 * count, rows + 16 * count
    tokens = rows + 24 * count
    table = tokens + 8 * count * slots
    frame = layer_frame
    f.store_word(frame, f.ROWS, count * slots)
    f.store_word(frame, f.SEQUENCES, count)
    f.store_word(frame, f.TABLE_WIDTH, width)
    f.store_word(frame, f.ANCHORS, positions)
    f.store_word(frame, f.PAGE_TABLE, table)
    f.store_word(frame, f.TOKENS, tokens)
    f.store_word(frame, f.LOGIT_ROWS, table + 8 * count * width if length < slots else 0)
    f.store_word(frame, f.LOGIT_COUNT, count * length)
    run_team(team, layers, frame, layer_stages)
    error = f.word(frame, f.ERROR)
    if error:
        return error
    frame = head_frame
    f.store_word(frame, m.COUNT, count)
    f.store_word(frame, m.BLOCK, length)
    f.store_word(frame, m.ANCHORS, anchors)
    f.store_word(frame, m.POSITIONS, positions)
    f.store_word(frame, m.PROPOSALS, proposals)
    run_team(team, head, frame, one_stage(count, count * length * f.word(frame, m.WIDTH)))
    return 0
