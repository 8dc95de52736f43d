"""What the scheduler keeps of every running request, as rows of flat arrays; see `native_books` for the columns."""

from __future__ import annotations

import math
from array import array

import numpy as np

from engine.schedule import native_books as b
from engine.schedule.calibrate import Calibration
from engine.schedule.native_books import BANDS
from engine.schedule.policies import LengthPolicy, StaticLengths
from engine.schedule.reliability import band
from engine.types import Request, Sequence, SpeculationMode, Verification

Array = np.ndarray
HEAVIEST = 4.0  # the most that priority, and that lateness, multiply a request's tokens with
_RATE_S = 1.0  # seconds over which a request's tokens a second are averaged
_MODES = {
    SpeculationMode.OFF: b.OFF,
    SpeculationMode.FIXED: b.FIXED,
    SpeculationMode.THRESHOLD: b.THRESHOLD_MODE,
    SpeculationMode.AUTO: b.AUTO,
}


class Books:
    """One row a running request; `Sequence.slot` says which.

    Args:
        block_size: γ, at least 1.
        max_length: tokens that the context holds.
        calibration: of the drafter's confidences.
    """

    def __init__(self, block_size: int, max_length: int, calibration: Calibration | None) -> None:
        self.block_size = block_size
        self.max_length = max_length
        self.calibration = calibration
        self.whole = np.zeros((16, b.WHOLE), np.int64)
        self.real = np.zeros((16, b.REAL))
        self.curves = np.zeros((16, b.BLOCKS, block_size))  # corrected survivals of the last blocks
        self.classes = np.zeros((BANDS * b.LEVELS, b.CLASS_BLOCKS, block_size))  # by `class_of`
        self.class_count = np.zeros(BANDS * b.LEVELS, np.int64)
        self.gallery = np.zeros((BANDS, b.GALLERY_REQUESTS, b.GALLERY_BLOCKS, block_size))
        self.tally = np.zeros((BANDS, b.GALLERY_REQUESTS + 2), np.int64)  # `native_outlook`
        self.ratios = np.full(block_size, 0.6)  # how a survival usually compares with the one before it
        self._lay_bare()
        self.asking = 0  # requests that do not leave to the policy how much is verified
        self._free = list(range(15, -1, -1))

    def enter(self, sequence: Sequence, policy: LengthPolicy | None) -> None:
        """A row with an empty past."""
        if not self._free:
            size = len(self.whole)
            for name in ("whole", "real", "curves"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
            self._lay_bare()
            self._free = list(range(2 * size - 1, size - 1, -1))
        slot = sequence.slot = self._free.pop()
        request = sequence.request
        coupled = sequence.verification is Verification.COUPLED
        method = -1
        if self.calibration is not None:
            method = self.calibration.index(sequence.verification, request.sampling.temperature)
        tokens, threshold = request.speculation.draft_tokens, request.speculation.confidence_threshold
        whole, real = [0] * b.WHOLE, [0.0] * b.REAL  # its curves are read as far as it has drafted
        whole[b.BAND] = band(request.sampling, sequence.verification)
        whole[b.METHOD] = method
        whole[b.END] = min(sequence.prompt_length + request.end.max_tokens, self.max_length)
        whole[b.MODE] = _MODES[request.speculation.mode]
        self.asking += whole[b.MODE] != b.AUTO
        whole[b.TOKENS] = -1 if tokens is None else tokens
        whole[b.FREE] = coupled or request.sampling.temperature == 0
        whole[b.LOOKS] = sequence.looks
        whole[b.LAST_DRAFT] = whole[b.GALLERY] = -1
        whole[b.CAP] = most_tokens(request, policy, self.block_size)
        most = math.log2(HEAVIEST)  # bounds the exponent: any 32-bit number may be a priority
        real[b.WEIGHT] = real[b.FACTOR] = 2.0 ** min(max(request.priority / 4, -most), most)
        real[b.THRESHOLD] = math.nan if threshold is None else threshold
        real[b.CHECKED], real[b.KEPT] = 4.0, 2.4
        real[b.LEAST_RATE] = request.min_tokens_per_s
        self._rows[0][slot * b.WHOLE : (slot + 1) * b.WHOLE] = array("q", whole)
        self._rows[1][slot * b.REAL : (slot + 1) * b.REAL] = array("d", real)

    def rule(self, sequence: Sequence, policy: LengthPolicy | None) -> None:
        """The most that a request may draft under a policy."""
        self.whole[sequence.slot, b.CAP] = most_tokens(sequence.request, policy, self.block_size)

    def weight(self, slot: int) -> float:
        """What one of its tokens counts."""
        return float(self._rows[1][slot * b.REAL + b.WEIGHT])

    def _lay_bare(self) -> None:
        """The words of both, one after the other: an array takes several times as long to read or write."""
        self._rows = self.whole.data.cast("B").cast("q"), self.real.data.cast("B").cast("d")

    def leave(self, sequence: Sequence) -> None:
        """A request is gone."""
        self._free.append(sequence.slot)
        self.asking -= sequence.request.speculation.mode is not SpeculationMode.AUTO
        sequence.slot = -1

    def follow_rate(self, slot: int, tokens: int, clock: float) -> None:
        """Tokens a second over about the last second; the weight of a request that is too slow rises."""
        row = self.real[slot]
        passed, rate = clock - row[b.LAST_S], row[b.RATE]
        if row[b.LAST_S] and passed > 0:
            share = passed / (passed + _RATE_S) if rate else 1.0
            row[b.RATE] = rate = rate + share * (tokens / passed - rate)
        row[b.LAST_S] = clock
        late = 0 < rate < row[b.LEAST_RATE]
        row[b.WEIGHT] = row[b.FACTOR] * (min(row[b.LEAST_RATE] / rate, HEAVIEST) if late else 1.0)


def most_tokens(request: Request, policy: LengthPolicy | None, block_size: int) -> int:
    """Draft tokens that a request, and a policy of fixed lengths, let it use at most."""
    wish, caps = request.speculation, [block_size]
    if wish.max_draft_tokens is not None:
        caps.append(wish.max_draft_tokens)
    if wish.mode is SpeculationMode.FIXED and wish.draft_tokens is not None:
        caps.append(wish.draft_tokens)
    if wish.mode is SpeculationMode.AUTO and isinstance(policy, StaticLengths) and policy.fixed_tokens is not None:
        caps.append(policy.fixed_tokens)
    return max(min(caps), 0)
