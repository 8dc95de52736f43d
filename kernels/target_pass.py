"""The target's whole round in one call from Python: rows laid out, layers, vocabulary head, verification.

For rounds of decoding alone, in which every row has logits. See `kernels.draft_pass` for why.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import empty

from kernels import layer_frame as f
from kernels import verify_native as v
from kernels.arrays import bytes_at, doubles_at, wholes2_at, wholes_at
from kernels.filters import SamplingRows
from kernels.host_draft import NO_DRAFT, HostDraft
from kernels.jit import entry
from kernels.layer_products import copy_floats
from kernels.layer_run import grown, holds, lay_frame, refuse, run_frame, scratch_of, stages_of
from kernels.layout import COLUMNS, lay
from kernels.threads import get_threads, one_stage, run_team, team_and
from kernels.values import PAGE, Ends, LayerStack, RopeTable
from kernels.verify import verify_frame


@dataclass(slots=True)
class _Prepared:
    """What passes of up to some size are told; what it has addresses of is held here, by the pass or by the target."""

    room: tuple[int, int, int]  # requests, rows, pages of a request
    threads: int
    base: int  # of the scratch that the layers' frame names
    sampling: SamplingRows
    layers: array[int]
    verdict: array[int]
    words: tuple[int, int, int]  # addresses of both, and the first's number of stages
    chosen: np.ndarray  # [2 · requests] int64: accepted, then next tokens, behind each other
    failed: np.ndarray  # [requests] bool
    certainty: np.ndarray  # [requests] float64


class Decided(NamedTuple):
    """As `kernels.verify.verify_arrays`, and the rows as `kernels.layout.lay` laid them, page tables `width` wide."""

    accepted: tuple[int, ...]
    next_token: tuple[int, ...]
    failed: tuple[bool, ...]
    certainty: np.ndarray  # until the next round
    laid: np.ndarray
    width: int


class TargetPass:
    """Runs rounds with native code throughout."""

    def __init__(self, ends: Ends, stack: LayerStack, rope: RopeTable) -> None:
        self.ends, self.stack, self.rope = ends, stack, rope
        self._prepared: dict[tuple[int, ...], _Prepared] = {}  # by what is captured
        self._logits, self._last = empty(0, ends.head.n), empty(0, stack.shape[0])  # of a round

    @staticmethod
    def applies(ends: Ends, stack: LayerStack, rope: RopeTable) -> bool:
        fits = rope.cos.shape[1] * 2 == stack.shape[3] and ends.head.k == stack.shape[0]
        return stack.native and ends.native and not stack.windowed and fits

    def __call__(
        self,
        given: array[int],
        count: int,
        total: int,
        width: int,
        sampling: SamplingRows,
        capture: tuple[int, ...] = (),
        features: int = 0,
        kept: int = 0,
        place: int = 0,
        draft: HostDraft = NO_DRAFT,
    ) -> Decided:
        """Run `total` rows of `count` requests, the last drafted ones of each, and decide.

        Args:
            given: COLUMNS numbers (kernels.layout) a request, then one token each, the last committed.
            width: the most pages of a request.
            capture: as `kernels.forward`; `features` is the address of [total, len(capture) · H] float32, `kept` that
                of [total] int64, or 0; at `place`, if it is not 0, those of the kept rows lie behind each other then.
            draft: as `kernels.verify`.

        Raises:
            ValueError: a page or a position does not exist.
        """
        prepared = self._prepared.get(capture)
        if prepared is None or not holds(prepared.room, count, total, width, prepared.threads, prepared.base):
            prepared = self._prepare((count, total, width), capture, sampling)
        if sampling is not prepared.sampling:
            prepared.verdict[v.TEMPERATURE : v.POSITIONS] = array("q", sampling.addresses)
            prepared.sampling = sampling
        laid = np.empty(5 * total + 2 * (count + 1) + count * width + 5 * count + 1, np.int64)
        routines = (*team_and(run_frame), verify_frame())
        numbers = (given.buffer_info()[0], count, total, width, laid, features, kept, place)
        outcome = _decide(*routines, *prepared.words, *numbers, *draft.words)
        failed = (False,) * count
        if outcome < 0:
            failed = tuple(prepared.failed[:count].tolist())
        else:
            refuse(outcome)
        chosen = tuple(prepared.chosen[: 2 * count].tolist())
        return Decided(chosen[:count], chosen[count:], failed, prepared.certainty[:count], laid, width)

    def _prepare(self, wanted: tuple[int, int, int], capture: tuple[int, ...], sampling: SamplingRows) -> _Prepared:
        before = self._prepared.get(capture)
        room = grown((1, 1, 1) if before is None else before.room, wanted)
        count, rows, width = room
        vocabulary, hidden = self.ends.head.n, self.stack.shape[0]
        if rows > len(self._logits):
            self._prepared.clear()  # what was prepared speaks of memory that is given back now
            self._logits, self._last = empty(0), empty(0)
            self._logits, self._last = empty(rows, vocabulary), empty(rows, hidden)
        logits = self._logits.data_ptr()
        embedding, item, _, *behind = self.ends.words
        outputs = (0, 0, self._last.data_ptr(), logits, 0)
        last_words = (0, 1, embedding, item, vocabulary, *behind, *outputs, 0, 0)
        sizes = (self.stack.shape, rows, count, width, 0, get_threads())
        angles = self.rope.cos.shape[0] if self.stack.angles is None else min(len(self.rope.cos), self.stack.angles)
        kept = (0, len(capture) * hidden * 4)
        layers = lay_frame(sizes, angles, 0, self.stack, self.rope, (0, 0, 0, 0, 0), kept, last_words, capture)
        chosen, failed, certainty = np.empty(2 * count, np.int64), np.empty(count, np.bool_), np.empty(count)
        verdict = array("q", (0,) * v.WORDS)
        verdict[v.VOCABULARY], verdict[v.LOGITS] = vocabulary, logits
        verdict[v.TEMPERATURE : v.POSITIONS] = array("q", sampling.addresses)
        results = (chosen.ctypes.data, 0, failed.ctypes.data, certainty.ctypes.data)
        verdict[v.ACCEPTED :] = array("q", results)
        words = (layers.buffer_info()[0], verdict.buffer_info()[0], stages_of(len(self.stack.layers)))
        base, told = scratch_of(sizes), (layers, verdict, words)
        prepared = _Prepared(room, sizes[-1], base, sampling, *told, chosen, failed, certainty)
        self._prepared[capture] = prepared
        return prepared


@entry
def _decide(
    team, layers, verdict, layer_frame, verdict_frame, layer_stages, given, count, total, width, laid, features, kept,
    place, tokens, token_rows, block, logits, logit_rows, logit_block, log_z,
):  # fmt: skip
    """An error of the layers, or 0; −1 where a request's logits were broken."""
    numbers = wholes_at(given, count * COLUMNS + count)
    lay(numbers, count, wholes2_at(tokens, token_rows, block), PAGE, width, total, laid)
    at = laid.ctypes.data
    table = at + 8 * (4 * total + 2 * (count + 1))
    asked = at + 8 * (laid.shape[0] - 5 * count - 1)  # lengths, draft rows, positions, proposals, offsets
    frame = layer_frame
    f.store_word(frame, f.ROWS, total)
    f.store_word(frame, f.SEQUENCES, count)
    f.store_word(frame, f.TABLE_WIDTH, width)
    f.store_word(frame, f.TOKENS, at)
    f.store_word(frame, f.POSITIONS, at + 8 * total)
    f.store_word(frame, f.SEQUENCE_OF_ROW, at + 16 * total)
    f.store_word(frame, f.SLOTS, at + 24 * total)
    f.store_word(frame, f.PAGE_TABLE, table)
    f.store_word(frame, f.FEATURES, features)
    f.store_word(frame, f.KEPT, kept)
    f.store_word(frame, f.LOGIT_ROWS, table + 8 * count * width)
    f.store_word(frame, f.LOGIT_COUNT, total)
    run_team(team, layers, frame, layer_stages)
    error = f.word(frame, f.ERROR)
    if error:
        return error
    if place:
        bytes_ = f.word(frame, f.FEATURE_STRIDE)
        for row in range(total):
            if kept == 0 or f.word(kept, row):
                copy_floats(features + row * bytes_, place, bytes_ // 4)
                place += bytes_
    frame = verdict_frame
    f.store_word(frame, v.COUNT, count)
    f.store_word(frame, v.ROWS, total)
    f.store_word(frame, v.LENGTHS, asked)
    f.store_word(frame, v.DRAFT_ROWS, asked + 8 * count)
    f.store_word(frame, v.POSITIONS, asked + 16 * count)
    f.store_word(frame, v.PROPOSALS, asked + 24 * count)
    f.store_word(frame, v.OFFSETS, asked + 32 * count)
    f.store_word(frame, v.TOKENS, tokens)
    f.store_word(frame, v.TOKEN_ROWS, token_rows)
    f.store_word(frame, v.BLOCK, block)
    f.store_word(frame, v.DRAFT_LOGITS, logits)
    f.store_word(frame, v.DRAFT_ROW_COUNT, logit_rows)
    f.store_word(frame, v.DRAFT_BLOCK, logit_block)
    f.store_word(frame, v.DRAFT_LOG_Z, log_z)
    f.store_word(frame, v.NEXT_TOKEN, f.word(frame, v.ACCEPTED) + 8 * count)
    accepted, chosen = wholes_at(f.word(frame, v.ACCEPTED), count), wholes_at(f.word(frame, v.NEXT_TOKEN), count)
    failed, certainty = bytes_at(f.word(frame, v.FAILED), count), doubles_at(f.word(frame, v.CERTAINTY), count)
    for i in range(count):
        accepted[i], chosen[i], failed[i], certainty[i] = 0, -1, 0, np.nan
    run_team(team, verdict, frame, one_stage(count, total * f.word(frame, v.VOCABULARY)))
    for i in range(count):
        if failed[i]:
            return -1
    return 0
