"""One whole round as a function of tensors: draft, select, verify, absorb, go on.

Nothing in here reads a value back, and every shape follows from the `Size`: the same calls can be captured in a
graph, replayed, or simply made. Seats that nobody sits on, and rows that nobody needs, run on the scratch page and are
ignored. The order is `Engine.step`'s, so between two rounds nothing is pending but what the seats hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.device_rounds.state import Fate, Found, Real, RoundState, Whole
from engine.drafters.dspark import DSparkDrafter
from engine.models.decoder import DecoderModel
from engine.types import Batch
from kernels.markov_sample import DraftSample
from kernels.select_lengths import select_lengths
from kernels.verify import verify

_EDGE = 1e-4  # confidences are kept this far from 0 and 1, as in `engine.schedule.reliability`


class Size(NamedTuple):
    """What a round is padded to."""

    seats: int  # R
    rows: int  # T, at least R; T = R where nobody drafts
    drafts: bool

    @property
    def room(self) -> int:
        """Draft tokens that it can verify."""
        return self.rows - self.seats


class Layout(NamedTuple):
    """The flat rows of a round."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    owners: Tensor  # [T] rows of the page table, 0 for nobody
    slots: Tensor  # [T]
    offsets: Tensor  # [R + 1]: where each seat's rows begin


class DeviceRound:
    """Runs rounds on a state.

    Args:
        drafter: None for plain decoding. With one every round absorbs, also those in which nobody drafts.
    """

    def __init__(self, target: DecoderModel, drafter: DSparkDrafter | None, state: RoundState) -> None:
        self.target, self.drafter, self.state = target, drafter, state
        self._capture = drafter.feature_layers if drafter is not None else ()

    def run(self, size: Size) -> None:
        """A round of the first `size.seats` seats."""
        state, seats = self.state, size.seats
        whole = state.whole[:, :seats]
        sampling = state.sampling(seats)
        alive = (whole[Whole.ACTIVE] != 0) & (whole[Whole.LENGTH] + 1 < whole[Whole.END])
        length = torch.where(alive, whole[Whole.LENGTH], 0)
        anchors, proposals = whole[Whole.ANCHOR].clone(), whole[Whole.PROPOSALS].clone()
        sample, lengths = None, torch.zeros_like(anchors)
        if size.drafts:
            assert self.drafter is not None
            sample = self.drafter.draft(anchors, length, proposals, state.table[1 : seats + 1], sampling)
            lengths = self._select(sample, alive, length, size)
        tokens = anchors.new_zeros((seats, 0)) if sample is None else sample.tokens
        rows = lay_out(state, size.rows, anchors, length, alive, tokens, lengths)
        logits, features = self.target.forward(self._batch(rows, seats), self._capture)
        owners = torch.arange(seats, device=anchors.device)
        accepted, following, failed = verify(
            logits,
            rows.offsets,
            tokens,
            lengths,
            None if sample is None else sample.logits,
            None if sample is None else sample.log_z,
            torch.where(lengths > 0, owners, -1),
            sampling,
            length + 1,
            proposals,
        )
        if self.drafter is not None:
            # Rejected rows, too: like the target's, they lie behind the next anchor and are written again.
            assert features is not None
            self.drafter.store(features, rows.positions, rows.slots)
        good = alive & ~failed
        whole[Whole.LENGTH] += torch.where(good, accepted + 1, 0)
        whole[Whole.ANCHOR] = torch.where(good, following, anchors)
        if size.drafts:
            whole[Whole.PROPOSALS] += alive
        found = state.found[:, :seats]
        found[Found.STATE] = torch.where(failed, int(Fate.FAILED), int(Fate.WENT_ON)) * alive
        found[Found.ACCEPTED] = accepted
        found[Found.NEXT] = following
        found[Found.VERIFIED] = lengths
        found[len(Found) : len(Found) + tokens.shape[1]] = tokens.T

    def _select(self, sample: DraftSample, alive: Tensor, length: Tensor, size: Size) -> Tensor:
        """Verified lengths [R]. Reads confidences from left to right and a budget that is older than the block."""
        state, block, seats = self.state, self.state.block, size.seats
        whole, real = state.whole[:, :seats], state.real[:, :seats]
        given = sample.confidence
        if given is None:
            given = torch.full_like(sample.log_z, 0.5)  # whose logit is 0: the shifts say it all
        state.confidence[:, :seats] = given.T
        inner = given.clamp(_EDGE, 1 - _EDGE)
        shift, slope = real[len(Real) : len(Real) + block].T, real[len(Real) + block :].T
        conditional = torch.sigmoid(shift + slope * torch.log(inner / (1 - inner)))
        sure = (conditional >= real[Real.THRESHOLD][:, None]).long().cumprod(1).sum(1)
        left = whole[Whole.END] - length - 2
        limits = torch.minimum(torch.minimum(whole[Whole.MOST], left), sure).clamp(min=0) * alive
        return select_lengths(conditional, real[Real.WEIGHT], limits, state.budget.clamp(max=size.room))[0]

    def _batch(self, rows: Layout, seats: int) -> Batch:
        """The rows for the target, all with logits."""
        table = self.state.table[: seats + 1]
        return Batch(rows.ids, rows.positions, rows.offsets, rows.owners, rows.slots, table, rows.ids, rows.offsets)


def lay_out(
    state: RoundState, count: int, anchors: Tensor, length: Tensor, alive: Tensor, tokens: Tensor, lengths: Tensor
) -> Layout:
    """`count` rows: of each seat its anchor and the first ℓ drafted tokens; what is left belongs to nobody."""
    seats = len(anchors)
    offsets = torch.nn.functional.pad((1 + lengths).cumsum(0), (1, 0))
    index = torch.arange(count, device=anchors.device)
    owner = torch.searchsorted(offsets, index, right=True) - 1
    used = owner < seats
    owner = owner.clamp(max=seats - 1)
    place = index - offsets[owner]
    mine = used & alive[owner]
    ids = anchors[owner]
    if tokens.shape[1]:
        drafted = tokens[owner, (place - 1).clamp(0, tokens.shape[1] - 1)]
        ids = torch.where(mine & (place > 0), drafted, ids)
    positions = torch.where(mine, length[owner] + place, 0)
    owners = torch.where(mine, owner + 1, 0)
    # Rows of nobody share the scratch page; that several write one slot of it harms nobody.
    slots = state.table[owners, positions // PAGE_SIZE] * PAGE_SIZE + torch.where(mine, positions, index) % PAGE_SIZE
    return Layout(ids, positions, owners, slots, offsets)
