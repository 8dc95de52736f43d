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
from kernels.jit import entry
from kernels.layer_run import Sizes, lay_frame, refuse, run_frame, scratch_of, stages_of
from kernels.layout import BLOCK_COLUMNS, lay_blocks
from kernels.markov_sample import DraftSample, new_sample, sample_frame
from kernels.threads import ALONE, get_threads, run_team, team_and
from kernels.values import Ends, LayerStack, RopeTable

_PAGES_A_STEP = 4  # page tables grow by so many columns, so that few of them are new
_KEPT = 4  # different shapes of pass
# Words of a pass.
_COUNT, _SLOTS, _MASK, _FIRST, _LENGTH, _WIDTH, _ROWS, _ROW_WORDS, _LAYERS, _STAGES, _HEAD, _HEAD_STAGES = range(12)


@dataclass(slots=True)
class _Prepared:
    """What a pass of one shape is told; everything at an address in it is held here or by the drafter."""

    sizes: Sizes
    base: int  # of the scratch that the layers' frame names
    sampling: SamplingRows
    words: array[int]
    layers: array[int]
    head: array[int]
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
        self._prepared: dict[tuple[int, int, int], _Prepared] = {}

    @staticmethod
    def applies(ends: Ends, stack: LayerStack, rope: RopeTable, head: HeadWeights) -> bool:
        fits = rope.cos.shape[1] * 2 == stack.shape[3] and not stack.windowed and ends.head.k == stack.shape[0]
        return stack.native and ends.native and head.step is None and fits

    def __call__(self, given: array[int], count: int, width: int, length: int, sampling: SamplingRows) -> DraftSample:
        """Draft `length` tokens for `count` requests.

        Args:
            given: BLOCK_COLUMNS numbers (kernels.layout) a request.
            width: the most pages of a request.

        Raises:
            ValueError: a page or a position does not exist.
        """
        assert len(given) == count * BLOCK_COLUMNS
        width = -(-width // _PAGES_A_STEP) * _PAGES_A_STEP
        prepared = self._prepared.get((count, width, length))
        if prepared is None or prepared.base != scratch_of(prepared.sizes) or prepared.sizes[5] != get_threads():
            prepared = self._prepare(count, width, length, sampling)
        if sampling is not prepared.sampling:
            prepared.head[m.TEMPERATURE : m.POSITIONS] = array("q", sampling.addresses)
            prepared.sampling = sampling
        sample, outputs = new_sample(count, length, self.ends.head.n, self.head, sampling)
        prepared.head[m.TOKENS :] = array("q", outputs)
        refuse(_draft(*team_and(run_frame), sample_frame(), prepared.words.buffer_info()[0], given.buffer_info()[0]))
        return sample

    def _prepare(self, count: int, width: int, length: int, sampling: SamplingRows) -> _Prepared:
        slots, vocabulary, hidden = self.slots, self.ends.head.n, self.stack.shape[0]
        rows = np.empty(count * (3 + slots + width + length), np.int64)
        anchors = rows.ctypes.data
        positions, proposals, tokens = (anchors + 8 * count * k for k in (1, 2, 3))
        table = tokens + 8 * count * slots
        predicting = table + 8 * count * width
        base, last = empty(count * length, vocabulary), empty(count * length, hidden)
        embedding, item, _, *behind = self.ends.words
        logit_rows = predicting if length < slots else 0
        outputs = (logit_rows, count * length, last.data_ptr(), base.data_ptr(), 0)
        last_words = (0, tokens, embedding, item, vocabulary, *behind, *outputs, 0, 0)
        sizes = (self.stack.shape, count * slots, count, width, slots, get_threads())
        angles = self.rope.cos.shape[0] if self.stack.angles is None else min(len(self.rope.cos), self.stack.angles)
        places = (0, 0, 0, table, positions)
        layers = lay_frame(sizes, angles, 0, self.stack, self.rope, places, (0, 0), last_words)
        wide = vocabulary if self.head.ids is None else self.head.vocabulary
        head = array(
            "q",
            (
                *(0, count, length, vocabulary, wide, base.data_ptr(), last.data_ptr(), hidden, anchors),
                *(*self.head.words, *sampling.addresses, positions, proposals, *(0,) * (m.WORDS - m.TOKENS)),
            ),
        )
        words = array(
            "q",
            (
                *(count, slots, self.mask, self.first, length, width, anchors, len(rows)),
                *(layers.buffer_info()[0], stages_of(len(self.stack.layers))),
                *(head.buffer_info()[0], 1 if count > 1 else ALONE),
            ),
        )
        prepared = _Prepared(sizes, scratch_of(sizes), sampling, words, layers, head, (rows, base, last))
        if len(self._prepared) >= _KEPT:
            del self._prepared[next(iter(self._prepared))]
        self._prepared[count, width, length] = prepared
        return prepared


@entry
def _draft(team, layers, head, words, given):
    """An error of the layers, or 0."""
    count = f.word(words, _COUNT)
    rows = wholes_at(f.word(words, _ROWS), f.word(words, _ROW_WORDS))
    numbers = wholes_at(given, count * BLOCK_COLUMNS)
    lay_blocks(
        numbers,
        count,
        f.word(words, _SLOTS),
        f.word(words, _MASK),
        f.word(words, _FIRST),
        f.word(words, _LENGTH),
        f.word(words, _WIDTH),
        rows,
    )
    frame = f.word(words, _LAYERS)
    run_team(team, layers, frame, f.word(words, _STAGES))
    error = f.word(frame, f.ERROR)
    if error == 0:
        run_team(team, head, f.word(words, _HEAD), f.word(words, _HEAD_STAGES))
    return error
