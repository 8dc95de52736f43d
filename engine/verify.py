"""Verify: one ragged target forward over committed and drafted rows, then acceptance → Verdict."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import torch

from engine.batch import build_batch, joined_arrays, joined_indices
from engine.models.decoder import DecoderModel
from engine.sampling import sampling_rows
from engine.types import Batch, DraftBlock, PlanRow, Sequence, StepPlan, TokenLogprob, Verdict
from kernels.logprobs import token_logprobs
from kernels.penalties import penalize_
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

    def run(self, plan: StepPlan, block: DraftBlock | None) -> Verdict:
        batch = build_batch(plan, block, self.target.device)
        capture = self.capture if any(row.sequence.followed for row in plan.rows) else ()
        logits, features = self.target.forward(batch, capture)
        count = len(plan.rows)
        deciding = [index for index, row in enumerate(plan.rows) if row.needs_token]
        accepted = [0] * count
        following: list[int | None] = [None] * count
        failed = [False] * count
        logprobs: list[tuple[TokenLogprob, ...]] = [()] * count
        certainty = None
        if deciding:
            rows = [plan.rows[index] for index in deciding]
            wants_logprobs = any(row.sequence.request.logprobs is not None for row in rows)
            raw = logits.clone() if wants_logprobs else logits
            kept, chosen, bad, certainty = self._decide(rows, batch, logits, block)
            for index, length, token, broken in zip(deciding, kept, chosen, bad, strict=True):
                accepted[index], following[index], failed[index] = length, token, broken
            if wants_logprobs:
                logprobs = self._logprobs(plan, block, batch, raw, accepted, following)
        return Verdict(tuple(accepted), tuple(following), features, batch, tuple(logprobs), tuple(failed), certainty)

    def _decide(
        self, rows: list[PlanRow], batch: Batch, logits: torch.Tensor, block: DraftBlock | None
    ) -> tuple[list[int], list[int], list[bool], np.ndarray | None]:
        drafts = {id(s): i for i, s in enumerate(block.sequences)} if block is not None else {}
        sequences = tuple(row.sequence for row in rows)
        lengths = [row.draft_length for row in rows]
        offsets = [0, *accumulate(length + 1 for length in lengths)]
        if _may_edit(sequences):
            for row, (start, end) in zip(rows, pairwise(offsets), strict=True):
                _edit(logits[start:end], row, block, drafts)
        device = logits.device
        owners = [drafts.get(id(s), -1) for s in sequences]
        positions = [row.start + row.count - row.draft_length for row in rows]
        proposals = [s.proposals for s in sequences]
        sampling = sampling_rows(sequences, device)
        tokens = block.tokens if block is not None else _NO_DRAFT
        draft_logits = block.logits if block is not None else None
        log_z = block.log_z if block is not None else None
        if device.type == "cpu" and logits.dtype == torch.float32:
            arrays = joined_arrays((offsets, lengths, owners, positions, proposals))
            found = verify_arrays(
                logits.numpy(),
                tokens.numpy(),
                None if draft_logits is None else draft_logits.numpy(),
                None if log_z is None else log_z.numpy(),
                sampling,
                *arrays,
            )
            accepted, chosen, failed = (part.tolist() for part in found[:3])
            return accepted, chosen, failed, found[3]
        at, ell, rows_of, n, counters = joined_indices((offsets, lengths, owners, positions, proposals), device)
        kept, following, bad = verify(logits, at, tokens, ell, draft_logits, log_z, rows_of, sampling, n, counters)
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
        drafts = {id(s): i for i, s in enumerate(block.sequences)} if block is not None else {}
        offsets = batch.logit_offsets.tolist()
        found: list[tuple[TokenLogprob, ...]] = []
        for index, row in enumerate(plan.rows):
            wanted, token = row.sequence.request.logprobs, following[index]
            if wanted is None or token is None:
                found.append(())
                continue
            tokens = [token]
            if block is not None and accepted[index]:
                tokens = [*block.tokens[drafts[id(row.sequence)], : accepted[index]].tolist(), token]
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


@lru_cache(maxsize=4)  # as `sampling_rows`
def _may_edit(sequences: tuple[Sequence, ...]) -> bool:
    """Whether `_edit` could have anything to do for one of them."""
    return any(
        s.request.sampling.edits_logits or (s.request.end.min_tokens and s.request.end.stop_ids) for s in sequences
    )


def _edit(logits: torch.Tensor, row: PlanRow, block: DraftBlock | None, drafts: dict[int, int]) -> None:
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
        drafted = block.tokens[drafts[id(sequence)], : row.draft_length].tolist()
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
