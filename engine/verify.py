"""Verify: one ragged target forward over committed and drafted rows, then acceptance → Verdict."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from engine.batch import Numbers, build_batch, kept_rows, plan_numbers
from engine.models.decoder import DecoderModel
from engine.sampling import sampling_rows
from engine.types import Batch, DraftBlock, LaidOut, PlanRow, Sequence, StepPlan, TokenLogprob, Verdict
from kernels.filters import SamplingRows
from kernels.host_draft import NO_DRAFT, host_draft
from kernels.layer_run import roomy
from kernels.logprobs import token_logprobs
from kernels.penalties import penalize_
from kernels.target_pass import TargetPass
from kernels.verify import verify, verify_arrays

_NO_DRAFT = torch.zeros(0, 0, dtype=torch.int64)


class Verifier:
    """Runs the target on a plan and decides what of each draft is kept.

    Args:
        capture: target layers whose outputs the drafter absorbs.
    """

    def __init__(self, target: DecoderModel, capture: tuple[int, ...]) -> None:
        self.target = target
        self.capture = capture
        self._whole: TargetPass | None = None
        self.place = 0  # address where the next round's followed rows are to be written besides, if it can; 0: nowhere
        self.width = len(capture) * target.geometry.hidden_size  # of a row's features
        self._room = torch.empty(0, 0)
        self._rooms: dict[int, tuple[torch.Tensor, int]] = {}  # its first rows, by their number

    def run(self, plan: StepPlan, block: DraftBlock | None) -> Verdict:
        numbers = plan_numbers(plan, block)
        capture = self.capture if numbers.followed else ()
        place, self.place = self.place, 0
        if numbers.total == numbers.wanted and numbers.decided == len(plan.rows) and not numbers.windowed:
            verdict = self._run_whole(plan, block, numbers, capture, place)
            if verdict is not None:
                return verdict
        batch = build_batch(plan, block, self.target.device, numbers)
        logits, features = self.target.forward(batch, capture)
        rows, count = plan.rows, len(plan.rows)
        deciding = len(batch.decided.lengths)
        if not deciding:
            nothing = (0,) * count, (None,) * count
            return Verdict(*nothing, features, batch, ((),) * count, (False,) * count)
        if deciding < count:
            rows = tuple([row for row in rows if row.needs_token])
        sequences = tuple([row.sequence for row in rows])
        wishes = _wishes(sequences, self.target.device)
        raw = logits.clone() if wishes.logprobs else logits
        accepted, following, failed, certainty = self._decide(rows, wishes, batch, logits, block)
        chosen: list[int | None] = following  # type: ignore[assignment]  # lists are invariant
        if deciding < count:
            entries = zip(accepted, following, failed, strict=True)
            every = [next(entries) if row.needs_token else (0, None, False) for row in plan.rows]
            accepted, chosen, failed = (list(part) for part in zip(*every, strict=True))  # type: ignore[assignment]
        logprobs: tuple[tuple[TokenLogprob, ...], ...] = ((),) * count
        if wishes.logprobs:
            logprobs = tuple(self._logprobs(plan, block, batch, raw, accepted, chosen))
        return Verdict(tuple(accepted), tuple(chosen), features, batch, logprobs, tuple(failed), certainty)

    def _run_whole(
        self, plan: StepPlan, block: DraftBlock | None, numbers: Numbers, capture: tuple[int, ...], place: int
    ) -> Verdict | None:
        """A round of decoding in one native call; None where that does not apply."""
        target, count, device = self.target, len(plan.rows), self.target.device
        if self._whole is None or self._whole.stack is not target.stack:
            parts = (target.ends, target.stack, target.rope)
            if not count or not TargetPass.applies(*parts):
                return None
            self._whole = TargetPass(*parts)
        wishes = _wishes(tuple([row.sequence for row in plan.rows]), device)
        if wishes.edits or wishes.logprobs or "forward" in vars(target):  # somebody stands in between
            return None
        draft = NO_DRAFT
        if block is not None:
            if block.logits is None and wishes.sampling.any_rejection:
                return None
            draft = block.host or host_draft(block.tokens, block.logits, block.log_z)
        features, kept, places = None, None, (0, 0, 0)
        if capture:
            features, address = self._features(numbers.total)
            kept = kept_rows(plan, device) if numbers.followed < count else None
            places = address, 0 if kept is None else kept.data_ptr(), place
        given, total, width = numbers.given, numbers.total, numbers.width
        decided = self._whole(given, count, total, width, wishes.sampling, capture, *places, draft)
        rows = LaidOut(decided.laid, count, total, decided.width)
        nothing: tuple[tuple[TokenLogprob, ...], ...] = ((),) * count
        accepted, chosen, failed, certainty, *_ = decided
        return Verdict(accepted, chosen, features, rows, nothing, failed, certainty, bool(place and capture))

    def _features(self, total: int) -> tuple[torch.Tensor, int]:
        """Room for features of so many rows, the same every time, and its address."""
        found = self._rooms.get(total)
        if found is None:
            if total > len(self._room):
                self._room, self._rooms = torch.empty(roomy(total), self.width), {}
            rows = self._room[:total]
            found = self._rooms[total] = rows, rows.data_ptr()
        return found

    def _decide(
        self,
        rows: tuple[PlanRow, ...],
        wishes: _Wishes,
        batch: Batch,
        logits: torch.Tensor,
        block: DraftBlock | None,
    ) -> tuple[list[int], list[int], list[bool], np.ndarray | None]:
        asked = batch.decided
        if wishes.edits:
            for row, (start, end) in zip(rows, pairwise(asked.offsets.tolist()), strict=True):
                _edit(logits[start:end], row, block)
        tokens, draft_logits, log_z = _NO_DRAFT, None, None
        if block is not None:
            tokens, draft_logits, log_z = block.tokens, block.logits, block.log_z
        if logits.is_cpu and logits.dtype == torch.float32:
            found = verify_arrays(
                logits.numpy(),
                tokens.numpy(),
                None if draft_logits is None else draft_logits.numpy(),
                None if log_z is None else log_z.numpy(),
                wishes.sampling,
                asked.offsets,
                asked.lengths,
                asked.draft_rows,
                asked.positions,
                asked.proposals,
            )
            return found[0].tolist(), found[1].tolist(), found[2].tolist(), found[3]
        lengths, owners, positions, proposals, offsets = (torch.from_numpy(part).to(logits.device) for part in asked)
        kept, following, bad = verify(
            logits, offsets, tokens, lengths, draft_logits, log_z, owners, wishes.sampling, positions, proposals
        )
        return kept.tolist(), following.tolist(), bad.tolist(), None

    def _logprobs(
        self,
        plan: StepPlan,
        block: DraftBlock | None,
        batch: Batch,
        raw: torch.Tensor,
        accepted: list[int],
        following: list[int | None],
    ) -> list[tuple[TokenLogprob, ...]]:
        offsets = batch.logit_offsets.tolist()
        found: list[tuple[TokenLogprob, ...]] = []
        for index, row in enumerate(plan.rows):
            wanted, token = row.sequence.request.logprobs, following[index]
            if wanted is None or token is None:
                found.append(())
                continue
            tokens = [token]
            if block is not None and accepted[index]:
                tokens = [*block.tokens[block.places[id(row.sequence)], : accepted[index]].tolist(), token]
            start = offsets[index]
            ids = torch.tensor(tokens, dtype=torch.int64, device=raw.device)
            own, top_ids, top_values = token_logprobs(raw[start : start + len(tokens)], ids, wanted)
            found.append(
                tuple(
                    TokenLogprob(token_id, value, tuple(zip(alternatives, values, strict=True)))
                    for token_id, value, alternatives, values in zip(
                        tokens, own.tolist(), top_ids.tolist(), top_values.tolist(), strict=True
                    )
                )
            )
        return found


class _Wishes(NamedTuple):
    """What requests that decode together ask for; it never changes."""

    sampling: SamplingRows
    edits: bool  # `_edit` could have something to do for one of them
    logprobs: bool


@lru_cache(maxsize=4)  # the same sequences decode together for many rounds
def _wishes(sequences: tuple[Sequence, ...], device: torch.device) -> _Wishes:
    requests = [sequence.request for sequence in sequences]
    return _Wishes(
        sampling_rows(sequences, device),
        any(r.sampling.edits_logits or (r.end.min_tokens and r.end.stop_ids) for r in requests),
        any(r.logprobs is not None for r in requests),
    )


def _edit(logits: torch.Tensor, row: PlanRow, block: DraftBlock | None) -> None:
    """Penalties, bias and masked stop ids on each verified position, the drafts before it counted.

    Args:
        logits: [1 + ℓ, V] of one sequence, changed in place.
    """
    sequence = row.sequence
    sampling, end = sequence.request.sampling, sequence.request.end
    masks_stop = sequence.output_length < end.min_tokens and end.stop_ids
    if not (sampling.edits_logits or masks_stop):
        return
    drafted: list[int] = []
    if block is not None and row.draft_length:
        drafted = block.tokens[block.places[id(sequence)], : row.draft_length].tolist()
    counts = dict(sequence.output_counts)
    prompt = set(sequence.tokens[: sequence.prompt_length]) if sampling.repetition_penalty != 1.0 else set()

    def ids(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=logits.device)

    bias_values = torch.tensor([value for _, value in sampling.logit_bias], device=logits.device)
    for position in range(1 + row.draft_length):
        if position:
            token = drafted[position - 1]
            counts[token] = counts.get(token, 0) + 1
        penalize_(
            logits[position],
            seen_ids=ids(prompt | counts.keys()) if prompt else None,
            output_ids=ids(counts.keys()),
            output_counts=ids(counts.values()),
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
            bias_ids=ids(token for token, _ in sampling.logit_bias),
            bias_values=bias_values,
            banned_ids=ids(end.stop_ids) if sequence.output_length + position < end.min_tokens else None,
        )
