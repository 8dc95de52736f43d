"""Whose features are kept, so that they may draft: features cost time, and most of it is wasted where nobody drafts.

A newcomer is followed where requests like it have drafted with profit, for as long as it does; now and then one is
followed as a scout, to see whether drafting would pay by now.
"""

from __future__ import annotations

import numpy as np

from engine.schedule import native_books as b
from engine.schedule import native_following
from engine.schedule.books import Books, most_tokens
from engine.schedule.cost import LiveCost
from engine.schedule.policies import AutoLengths, LengthPolicy
from engine.schedule.reliability import band
from engine.types import Phase, Sequence, SpeculationMode, Verification

REVIEW = 16  # rounds between two looks at who is followed
PATIENCE = 32  # rounds without a draft, until a request is not followed any more
_KEPT = 2.5  # of what finding room for features takes: writing them, in the pass, comes to as much and half again
_MOST_KEEPING = 0.2  # of a round
COPIES = 4  # who copied more than one token in so many says nothing of drafting


class Following:
    """Decides for newcomers, and remembers the scouts among them.

    Args:
        memory: the planner's numbers, `native_books`.
    """

    def __init__(self, cost: LiveCost, books: Books, memory: np.ndarray, block_size: int) -> None:
        self.cost, self.books, self._memory, self._block_size = cost, books, memory, block_size
        self.certain = False  # the target's certainty is known, where verification works it out
        self._scouts: list[Sequence] = []
        self._others: list[Sequence] = []  # that are followed because it was to pay
        self._until_review = REVIEW

    def wants(self, sequence: Sequence, policy: LengthPolicy | None, load: int, absorbed: int, spared: float) -> bool:
        """Whether a newcomer's features are to be kept; arguments as in `Planner.follows`."""
        if policy is None or not self._block_size or not most_tokens(sequence.request, policy, self._block_size):
            return False
        mode = sequence.request.speculation.mode
        if mode is not SpeculationMode.AUTO or not isinstance(policy, AutoLengths):
            return mode is not SpeculationMode.OFF
        length, books = len(sequence.tokens), self.books
        end = min(sequence.prompt_length + sequence.request.end.max_tokens, books.max_length)
        verdict: int = native_following.follow(
            band(sequence.request.sampling, sequence.verification),
            float(load),
            (length + end) / 2,
            float(end - length),
            float(absorbed),
            float(spared),
            self._memory,
            books.gallery,
            books.tally,
            *self.cost.arrays,
        )
        # Of whom the target is certain its rounds will tell; of others a block must.
        rejects = sequence.verification is Verification.REJECTION and sequence.request.sampling.temperature > 0
        tells = self.certain and rejects
        sequence.looks = (0, 0 if tells else 1, native_following.LOOKS)[verdict]
        if verdict:
            (self._scouts if verdict == native_following.SCOUT else self._others).append(sequence)
        return verdict > 0

    def take_back(self, sequence: Sequence) -> None:
        """Follow one that began again because that was to pay."""
        self._others.append(sequence)

    @property
    def anybody(self) -> bool:
        """Whether somebody may be followed of those to whom drafting is open."""
        return bool(self._scouts or self._others)

    def dismiss(self, decoding: list[Sequence], load: int) -> bool:
        """Scouts that have looked, and had better not draft, are no longer followed, nor is who has not drafted for
        long; whether there were any."""
        gone: list[Sequence] = []
        if self._scouts:
            gone = [s for s in self._scouts if s.slot >= 0 and self._looked(s) and not self._drafts(s)]
            self._scouts = [s for s in self._scouts if _is_there(s) and not (s.slot >= 0 and self._looked(s))]
        self._until_review -= 1
        if self._until_review <= 0:  # keeping features costs the host work in every round
            self._until_review = REVIEW
            gone += [s for s in self._others if s.phase is Phase.DECODE and s.slot >= 0 and self._idles(s)]
            self._others = [s for s in self._others if _is_there(s) and s not in gone]
        for sequence in gone:
            self.ends(sequence, load, decoding)
        for sequence in gone:
            sequence.followed = False
        return bool(gone)

    def _looked(self, sequence: Sequence) -> bool:
        return not self.books.whole[sequence.slot, b.LOOKS]

    def _drafts(self, sequence: Sequence) -> bool:
        return bool(self.books.whole[sequence.slot, b.DRAFTING])

    def _idles(self, sequence: Sequence) -> bool:
        """Whether drafting has not paid for it for long."""
        if self._drafts(sequence) or not self._looked(sequence) or _copies(sequence):
            return False
        own = self.books.whole[sequence.slot]
        since = self._memory[b.ROUND] - own[b.LAST_DRAFT] if own[b.BLOCKS_SEEN] else sequence.output_length
        return bool(since > PATIENCE)

    def kept(self, seconds: float) -> None:
        """A round without drafts kept features: what finding room for them took, stalls aside."""
        kept_s = min(_KEPT * seconds, _MOST_KEEPING * self._memory[b.PLAIN_S])
        self._memory[b.KEEPING_S] += native_following.GAIN * (kept_s - self._memory[b.KEEPING_S])

    def forget_ended(self) -> None:
        """Who has ended leaves nothing behind, also while nobody asks whom to dismiss."""
        self._scouts = [scout for scout in self._scouts if scout.phase is not Phase.FINISHED]
        self._others = [other for other in self._others if other.phase is not Phase.FINISHED]

    def ends(self, sequence: Sequence, load: int, decoding: list[Sequence]) -> None:
        """A request that was followed has drafted its last: whether it did more than look counts for those like it.

        Args:
            load: requests beside it that decode or will in a moment, itself included; decoding: those that decode.
        """
        if not sequence.followed or _copies(sequence):
            return  # had it not copied, it would have drafted, or not
        whole = self.books.whole[sequence.slot]
        if whole[b.MODE] == b.AUTO:
            followed = sum(other.followed for other in decoding) / len(decoding)
            scout = sequence.looks == native_following.LOOKS
            native_following.ended(float(load), whole[b.BLOCKS_SEEN], scout, followed, self._memory)


def _copies(sequence: Sequence) -> bool:
    """Whether much of its text is copied, so that its drafts say little."""
    return sequence.passages is not None and sequence.passages.copied * COPIES > sequence.output_length


def _is_there(sequence: Sequence) -> bool:
    """Whether it runs; who waits will be asked about again."""
    return sequence.phase in (Phase.PREFILL, Phase.DECODE)
