"""Features that the drafter has not absorbed yet: of requests that sit out, until one drafts again.

Absorbing costs a few percent of a plain round. A request for which drafting does not pay need not pay that either: its
rows wait here and are absorbed in one go when it returns, which is cheaper, or never. Those that are not even followed
(`Sequence.followed`) leave nothing here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.batch import build_batch, indices
from engine.drafters.drafter import Drafter
from engine.types import Phase, PlanRow, Sequence, StepPlan, Verdict

LIMIT_BYTES = 128 * 2**20
_FEWEST, _ROUNDS = 4, 32  # that a part has room for
_BATCH = 256  # rows absorbed at a time when the limit is reached
_SWEEP_BYTES = 2**20  # of features between two looks for what nobody needs any more, at first


@dataclass(slots=True)
class _Stretch:
    """Rounds on end in which the same sequences sat out, one row each. Kept as they come, read only if one returns."""

    owners: list[Sequence]
    starts: list[int]  # each one's position in the first of these rounds
    rounds: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)  # features [rounds on end, len(owners), F]
    bytes: int = 0
    room: np.ndarray | None = None  # on the CPU: the last part, of which so many rounds are filled
    filled: int = 0
    address: int = 0  # of the room
    beside: list[Sequence] = field(default_factory=list)  # all that ran in these rounds
    places: np.ndarray | None = None  # of the owners among them; None: they are all

    @property
    def ends(self) -> list[int]:
        """Each one's position in the round after the last."""
        return [start + self.rounds for start in self.starts]

    def goes_on(self, owners: list[Sequence], starts: list[int]) -> bool:
        """Whether these are the same sequences one round later."""
        return starts == self.ends and owners == self.owners

    def needed(self) -> list[Sequence]:
        """Those whose rows in here are still to be absorbed."""
        return [s for s, end in zip(self.owners, self.ends, strict=True) if s.pages and s.followed and s.absorbed < end]

    def goes_on_beside(self, rows: tuple[PlanRow, ...]) -> bool:
        """Whether these are the rounds' sequences, all of them, one round later."""
        if [row.sequence for row in rows] != self.beside:
            return False
        first = rows[0 if self.places is None else self.places[0]]
        # Somebody who began again may be followed by now.
        followed = [sequence for sequence in self.beside if sequence.followed]
        return first.start == self.starts[0] + self.rounds and followed == self.owners

    def next_place(self, width: int) -> int:
        """Where the owners' features of the next round go, [len(owners), width] float32, owner by owner: an address."""
        if self.room is None or self.filled == len(self.room):
            self.close()
            rounds = torch.empty(min(max(self.rounds, _FEWEST), _ROUNDS), len(self.owners), width)
            self.parts.append(rounds)
            self.room, self.filled = rounds.numpy(), 0
            self.address = self.room.ctypes.data
        return self.address + self.filled * self.room.strides[0]

    def put(self, features: np.ndarray) -> int:
        """One round more of all that ran, [T, F], copied into room that is there; the bytes of what is kept."""
        self.next_place(features.shape[1])
        assert self.room is not None
        if self.places is None:
            self.room[self.filled] = features
        else:
            features.take(self.places, 0, self.room[self.filled], "clip")  # which spares it a copy
        return self.advance()

    def advance(self) -> int:
        """The next place holds its round's features now; their bytes."""
        assert self.room is not None
        added = self.room.strides[0]
        self.filled += 1
        self.rounds += 1
        self.bytes += added
        return added

    def close(self) -> None:
        """No more rounds into the last part, which keeps no memory that it does not need."""
        if self.room is not None:
            last = self.parts[-1][: self.filled]
            self.parts[-1] = last.clone() if 2 * self.filled < len(self.room) else last
            self.room = None

    def add(self, features: torch.Tensor) -> None:
        """More rounds, [rounds, len(owners), F]."""
        self.close()
        self.parts.append(features)
        self.rounds += features.shape[0]
        self.bytes += features.nbytes

    def of(self, sequence: Sequence) -> torch.Tensor | None:
        """What this sequence has not absorbed yet, [rounds, F]."""
        if sequence not in self.owners:
            return None
        column = self.owners.index(sequence)
        first = max(sequence.absorbed - self.starts[column], 0)
        if first >= self.rounds:
            return None
        self.close()
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0][first:, column]


class Backlog:
    """Stands between the engine and the drafter's `absorb`.

    Args:
        limit_bytes: of features that may wait; beyond, the oldest are absorbed after all.
    """

    def __init__(self, drafter: Drafter, device: torch.device, limit_bytes: int = LIMIT_BYTES) -> None:
        self.drafter = drafter
        self.device = device
        self.limit_bytes = limit_bytes
        self._stretches: list[_Stretch] = []
        self._bytes = 0
        self._sweep_at = _SWEEP_BYTES

    def catch_up(self, sequences: Collection[Sequence]) -> int:
        """Between rounds: absorb everything that waits for these sequences, and for the oldest if too much waits.

        Returns:
            Rows absorbed.
        """
        chosen = {s: None for s in sequences if s.deferred} if sequences else {}
        if self._bytes > min(self.limit_bytes, self._sweep_at):
            self._sweep()
            for stretch in self._stretches if self._bytes > self.limit_bytes else ():
                if sum(s.deferred for s in chosen) >= _BATCH:
                    break
                chosen |= {s: None for s in stretch.needed() if s.deferred}
        return self._absorb(chosen) if chosen else 0

    def settle(self, sequence: Sequence) -> int:
        """Absorb what waits for this one, whose tokens are committed; others' may not be. Rows absorbed."""
        return self._absorb([sequence])

    def _absorb(self, chosen: Collection[Sequence]) -> int:
        rows: list[PlanRow] = []
        parts: list[torch.Tensor] = []
        for sequence in chosen:
            own = [kept for stretch in self._stretches if (kept := stretch.of(sequence)) is not None]
            assert sum(map(len, own)) == sequence.deferred, "the backlog has holes"
            parts += own
            rows.append(PlanRow(sequence, sequence.absorbed, sequence.deferred, 0, needs_token=False))
        plan = StepPlan(tuple(rows))
        following = tuple(row.sequence.tokens[row.start + row.count] for row in rows)
        features = torch.cat(parts)
        batch = build_batch(plan, None, self.device)
        nothing = (0,) * len(rows)
        self.drafter.absorb(plan, Verdict(nothing, following, features, batch, ((),) * len(rows), (False,) * len(rows)))
        return int(features.shape[0])

    def place_for(self, plan: StepPlan, width: int) -> int:
        """Where features of a round in which nobody drafts are to be written, so that nothing need be copied: the
        followed rows behind each other, [rows, width] float32; an address. 0: nowhere, `take` will see to them."""
        if self.device.type != "cpu" or not any(row.sequence.followed for row in plan.rows) or not _all_sit_out(plan):
            return 0
        stretch = self._going_on(plan.rows)
        return stretch.next_place(width) if stretch is not None else 0

    def take(self, plan: StepPlan, verdict: Verdict, drafting: Collection[Sequence]) -> int:
        """Absorb this round's kept rows of prompts and of sequences that draft, keep the others'; rows absorbed.

        Of sequences that nobody follows nothing is left.
        """
        features = verdict.features
        if features is None:
            return 0
        if verdict.placed:
            self._bytes += self._stretches[-1].advance()
            return 0
        if not drafting and _all_sit_out(plan):
            self._sat_out(plan.rows, features)
            return 0
        if all(row.drafted for row in plan.rows):  # everybody drafts, and nobody has a prompt left
            self.drafter.absorb(plan, verdict)
            return len(plan.rows) + sum(verdict.accepted)
        active = set(drafting)
        sitting_out = sum(row.sequence.followed for row in plan.rows) - len(active)
        now: list[int] = []
        later: list[PlanRow] = []
        places: list[int] = []  # of their rows among all
        place = 0
        for index, row in enumerate(plan.rows):
            if row.sequence.followed:
                if row.sequence.phase is not Phase.DECODE or row.sequence in active:
                    now.append(index)
                elif sitting_out <= len(active) and row.sequence.absorbed == row.start and not row.copied:
                    now.append(index)  # one row more costs less than keeping it
                elif row.copied:
                    # As if it had sat out for as many rounds as it kept rows.
                    kept = features[place : place + 1 + verdict.accepted[index], None].clone()
                    self._keep([row.sequence], [row], kept)
                else:
                    later.append(row)
                    places.append(place)
            place += row.count
        if later:
            kept = features.clone() if len(later) == place else features.index_select(0, indices(places, self.device))
            self._keep([row.sequence for row in later], later, kept[None])
        if not now:
            return 0
        self.drafter.absorb(plan, verdict, None if len(now) == len(plan.rows) else now)
        rows, accepted = plan.rows, verdict.accepted
        return sum(rows[index].count - rows[index].draft_length + accepted[index] for index in now)

    def _sat_out(self, rows: tuple[PlanRow, ...], features: torch.Tensor) -> None:
        """A round of one row each, in which nobody drafted."""
        if features.is_cpu:
            last = self._going_on(rows)
            if last is not None:
                self._bytes += last.put(features.numpy())
            return
        places = [place for place, row in enumerate(rows) if row.sequence.followed]
        if places:
            later = [rows[place] for place in places]
            every = len(places) == len(rows)
            kept = features.clone() if every else features.index_select(0, indices(places, self.device))
            self._keep([row.sequence for row in later], later, kept[None])

    def _going_on(self, rows: tuple[PlanRow, ...]) -> _Stretch | None:
        """On the CPU, the stretch that such a round goes on with, or begins; None where nobody is followed."""
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.beside and last.goes_on_beside(rows):
            return last
        places = [place for place, row in enumerate(rows) if row.sequence.followed]
        if not places:
            return None
        if last is not None:
            last.close()
        later = [rows[place] for place in places]
        last = _Stretch([row.sequence for row in later], [row.start for row in later])
        last.beside = [row.sequence for row in rows]
        last.places = None if len(places) == len(rows) else np.array(places)
        self._stretches.append(last)
        return last

    def _keep(self, owners: list[Sequence], rows: Iterable[PlanRow], features: torch.Tensor) -> None:
        """Put features [rounds, R, F] with those of the rounds before."""
        starts = [row.start for row in rows]
        if not self._stretches or not self._stretches[-1].goes_on(owners, starts):
            if self._stretches:
                self._stretches[-1].close()
            self._stretches.append(_Stretch(owners, starts))
        stretch = self._stretches[-1]
        stretch.add(features)
        self._bytes += features.nbytes

    def _sweep(self) -> None:
        """Forget what everybody has absorbed, and what was for sequences that are gone."""
        self._stretches = [stretch for stretch in self._stretches if stretch.needed()]
        self._bytes = sum(stretch.bytes for stretch in self._stretches)
        self._sweep_at = max(_SWEEP_BYTES, 2 * self._bytes)


def _all_sit_out(plan: StepPlan) -> bool:
    """Whether each row is one of somebody who decodes, where nobody drafts."""
    return all(row.count == 1 and row.sequence.phase is Phase.DECODE for row in plan.rows)
