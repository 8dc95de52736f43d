"""Prompt lookup: what followed when a sequence's last tokens stood in it before, as a draft that costs nothing to make
(Saxena 2023, "Prompt Lookup Decoding"; the n-gram drafts of other servers).

Code that is edited, documents that are quoted and greedy texts that repeat themselves are copied faster than any
drafter drafts them. It needs no features of the target, and stands beside a drafter, which is for what is new.

A copy is a guess without a distribution: the target's token is drawn as if nothing had been drafted, and the guess is
kept where it is that token (`kernels.verify`). Which copies are tried, and how much of them, hangs on committed tokens
alone.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from engine.copy_times import CopyTimes
from engine.schedule.native_books import BANDS
from engine.schedule.native_passages import look
from engine.schedule.reliability import band
from engine.types import DraftBlock, Sequence, SpeculationMode

WIDTH = 4  # tokens that must agree
FARTHEST = 32  # tokens that are compared
MOST = 15  # tokens a copy: sixteen rows with the anchor's
_IDLE = 7  # rounds until the next look where nothing was found, at most: looking takes longer the more there are
_LONGEST_REST = 16
_RARELY, _SHARE = 32, 0.002  # and where looks have not been worth their time: then they may take so much of it
_MOST_SAVED = 2.0  # such looks
_HOPED, _LOOK_GAIN = 0.2, 0.03  # tokens that a look brings: at first, and how fast that is followed
_SELDOM, _PATIENCE = 8, 4  # rounds until the next look where nothing was found for long, one for so many such looks
_EDGES = (6, 9, 16, FARTHEST)  # agreeing tokens, between the kinds of copies that are counted apart
_FIRST_GUESS = (0.5, 0.65, 0.8, 0.9, 0.95)  # of each kind: kept, given that all before were
_TRUST = 4.0  # tokens that a guess counts for
_MEMORY, _OWN = 200.0, 30.0  # tokens by which a kind is judged, of all sequences and of one
_HOPE = 0.01  # how fast a kind that is not tried returns to its first guess


@dataclass(slots=True)
class Passages:
    """Where each run of WIDTH tokens of one sequence last ended."""

    text: array[int] = field(default_factory=lambda: array("q"))  # its tokens as of the last look
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # `native_passages`
    address: int = 0  # of `places`
    band: int = 0  # of how its sequence samples
    rest: int = 0  # rounds until the next look
    quiet: int = 0  # looks since the last that found something
    copied: int = 0  # tokens kept
    misses: int = 0  # copies of which nothing was kept, since the last that was better
    kept: list[float] = field(default_factory=lambda: [0.0] * len(_FIRST_GUESS))  # of its own copies, by kind
    seen: list[float] = field(default_factory=lambda: [0.0] * len(_FIRST_GUESS))

    def find(self, tokens: list[int]) -> tuple[int, int]:
        """(where the earlier passage goes on, how many tokens before it agree with the last ones); (0, 0) for none."""
        read, count = len(self.text), len(tokens)
        self.text.extend(tokens[read:])
        if 2 * count > len(self.places):
            self.places = np.zeros(1 << (4 * count).bit_length(), np.int64)
            self.address, read = self.places.ctypes.data, 0
        texts = self.text.buffer_info()[0], count, read
        found: tuple[int, int] = look(*texts, self.address, len(self.places), WIDTH, FARTHEST)
        return found


@dataclass(frozen=True, slots=True)
class Copy:
    """One sequence's draft by lookup, as far as it is verified."""

    sequence: Sequence
    tokens: tuple[int, ...]
    survival: tuple[float, ...]  # of each token: that it and all before it are kept
    kinds: tuple[int, ...]  # by which each was judged
    price: float  # what verifying it costs, in tokens that the time would bring elsewhere


class PromptLookup:
    """Finds copies, chooses how much of each is worth verifying, and learns what becomes of them."""

    def __init__(self) -> None:
        self._kept = [[_TRUST * guess for guess in _FIRST_GUESS] for _ in range(BANDS)]
        self._seen = [[_TRUST] * len(_FIRST_GUESS) for _ in range(BANDS)]
        self._profit = [_HOPED] * BANDS  # of a look, in tokens
        self.times = CopyTimes()
        self.rest = 0  # rounds until anybody is due for a look
        self.asked = False  # in this round
        # Looks that may be taken in doubt, rounds that saved for more, and what each of them saves.
        self._saved, self._passed, self._a_round = 1.0, 0, 0.0

    def propose(
        self,
        sequences: Iterable[Sequence],
        count: int,
        limit: Callable[[Sequence], int],
        row_price: Callable[[], float],
        look_price: Callable[[], float],
    ) -> list[Copy]:
        """Copies that pay, each as long as that pays. Need not be called for the next `rest` rounds.

        Args:
            sequences: those that decode, `count` of them; who asks for drafts of its own (FIXED, …) does not copy.
            limit: tokens that a sequence could use.
            row_price: what a verified row costs, in tokens that its time would bring elsewhere; look_price: a look.
        """
        self.asked = True
        self._passed += 1
        found: list[Copy] = []
        looked: list[Passages] = []
        idle, dear, price = min(_IDLE, count - 1), -1.0, look_price()
        for sequence in sequences:
            passages = sequence.passages
            if passages is None:
                if sequence.request.speculation.mode is not SpeculationMode.AUTO:
                    continue
                passages = sequence.passages = Passages(band=band(sequence.request.sampling, sequence.verification))
            looked.append(passages)
            if passages.rest:
                passages.rest -= 1
                continue
            if self._doubts(passages, price) and (wait := self._wait(count, price, passages.quiet)):
                passages.rest = wait
                continue
            start, agree = passages.find(sequence.tokens)
            if not start or (most := min(limit(sequence), MOST)) <= 0:
                self._missed(passages, idle, price)
                continue
            if dear < 0:
                dear = row_price()
            kinds, survival = self._judge(passages, agree, most, dear)
            if not kinds:
                self._missed(passages, idle, price)
                continue
            passages.quiet = 0
            tokens, length = sequence.tokens, len(kinds)
            passage = tokens[start : start + length]
            for place in range(len(passage), length):  # it runs into the copy itself, and goes round
                passage.append(passage[place - (len(tokens) - start)])
            found.append(Copy(sequence, tuple(passage), survival, kinds, dear * length))
        if not found:
            self._sleep(looked)
            return found
        gain = sum(sum(copy.survival) - copy.price for copy in found)
        fixed = self.times.fixed_price(count)
        if gain > fixed:
            return [replace(copy, price=copy.price + max(fixed, 0.0) / len(found)) for copy in found]
        self.times.dropped(count)
        for copy in found:
            assert copy.sequence.passages is not None
            self._missed(copy.sequence.passages, idle, price)
        return []

    def _doubts(self, passages: Passages, price: float) -> bool:
        """Whether looks at such sequences have not been worth their time, nor has this one just copied."""
        if passages.copied and passages.quiet <= _PATIENCE:
            return False
        return max(self._profit[passages.band], 0.0) < price

    def _wait(self, count: int, price: float, quiet: int) -> int:
        """Rounds until a look in doubt may be taken, 0 for now: of `count` tokens a round they may cost a share.

        Who was looked at before leaves one for whoever comes.
        """
        self._a_round = _SHARE * count / price
        self._save(self._passed)
        rounds = self._until(_MOST_SAVED if quiet else 1.0)
        if not rounds:
            self._saved -= 1.0
        return rounds

    def _save(self, rounds: int) -> None:
        self._saved = min(self._saved + rounds * self._a_round, _MOST_SAVED)
        self._passed = 0

    def _until(self, needed: float) -> int:
        """Rounds until so many looks can be paid for."""
        return int((needed - self._saved) / self._a_round) + 1 if self._saved < needed else 0

    def _missed(self, passages: Passages, idle: int, price: float) -> None:
        """A look that brought nothing."""
        own = passages.band
        self._profit[own] *= 1 - _LOOK_GAIN
        passages.quiet += 1
        rest = min(passages.quiet // _PATIENCE, _SELDOM)
        if self._doubts(passages, price):
            rest = _RARELY
        passages.rest = max(idle, rest)

    def _sleep(self, looked: list[Passages]) -> None:
        """Skip the rounds in which nobody is due."""
        self.rest = rounds = min((passages.rest for passages in looked), default=_RARELY)
        self._passed += rounds
        if rounds:
            for passages in looked:
                passages.rest -= rounds

    def greet(self, comers: Iterable[Sequence], others: Iterable[Sequence], look_price: Callable[[], float]) -> None:
        """Whoever comes, or comes back, ends the rest; where looks like its are in doubt, when one can be paid for.

        Args:
            others: those that decode on.
        """
        price, rest = look_price(), self.rest
        self._save(self._passed - rest)  # the others have not passed yet
        for sequence in comers:
            if sequence.request.speculation.mode is not SpeculationMode.AUTO:
                continue
            passages = sequence.passages
            if passages is None:
                passages = Passages(band=band(sequence.request.sampling, sequence.verification))
            self.rest = min(self.rest, self._until(1.0) if self._doubts(passages, price) else 0)
        self._passed = self.rest
        for sequence in others:
            if sequence.passages is not None:
                sequence.passages.rest += rest - self.rest

    def learn(self, copy: Copy, accepted: int) -> None:
        """What became of a copy."""
        passages = copy.sequence.passages
        assert passages is not None
        own = passages.band
        self._profit[own] += _LOOK_GAIN * (accepted - copy.price - self._profit[own])
        for kept, seen, most in ((self._kept[own], self._seen[own], _MEMORY), (passages.kept, passages.seen, _OWN)):
            for place, kind in enumerate(copy.kinds[: accepted + 1]):
                if seen[kind] >= most:
                    kept[kind] *= 1 - 1 / most
                    seen[kind] *= 1 - 1 / most
                kept[kind] += place < accepted
                seen[kind] += 1.0
        passages.copied += accepted
        if accepted:
            passages.misses = 0
        else:
            passages.misses += 1
            passages.rest = min(1 << passages.misses, _LONGEST_REST)

    def _judge(
        self, passages: Passages, agree: int, most: int, dear: float
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Kind and survival of each token that is worth its row: every one that is kept makes the agreement longer."""
        own = passages.band
        kinds, survival, alive = [], [], 1.0
        kind, rate = -1, 0.0
        for place in range(agree, agree + most):
            now = bisect_right(_EDGES, place)
            if now != kind:
                kind = now
                usual = self._kept[own][kind] / self._seen[own][kind]
                rate = (passages.kept[kind] + _TRUST * usual) / (passages.seen[kind] + _TRUST)
            alive *= rate
            if alive <= dear:
                break
            kinds.append(kind)
            survival.append(alive)
        if not kinds:  # what does not pay is not tried, and would never be seen to pay again
            missing = _FIRST_GUESS[kind] - self._kept[own][kind] / self._seen[own][kind]
            self._kept[own][kind] += _HOPE * max(missing, 0.0) * self._seen[own][kind]
            return (), ()
        return tuple(kinds), tuple(survival)


def with_copies(block: DraftBlock | None, copies: list[Copy], device: torch.device) -> DraftBlock | None:
    """One block of everything that is proposed this round; the drafter's rows come first."""
    if not copies:
        return block
    longest = max(len(copy.tokens) for copy in copies)
    drafted = 0 if block is None else len(block.sequences)
    table = torch.from_numpy(_table(copies, longest if block is None else max(longest, block.tokens.shape[1]), drafted))
    if device.type != "cpu":
        table = table.to(device)
    owners = tuple(copy.sequence for copy in copies)
    if block is not None:
        table[:drafted, : block.tokens.shape[1]] = block.tokens
        owners = block.sequences + owners
        if block.logits is not None and block.log_z is not None:
            return DraftBlock(owners, table, None, block.logits, block.log_z)
    return DraftBlock(owners, table, None, torch.empty((0, 1, 0), device=device), torch.empty((0, 1), device=device))


def _table(copies: list[Copy], width: int, above: int) -> np.ndarray:
    """Copies' tokens as rows below so many others."""
    table = np.zeros((above + len(copies), width), np.int64)
    for row, copy in enumerate(copies, start=above):
        table[row, : len(copy.tokens)] = copy.tokens
    return table
