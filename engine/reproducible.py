"""Whether a row's logits depend, bit for bit, only on its own prefix: what seeds rest on.

Measured on the loaded model, on this machine, before the first request (DESIGN: row invariance).
"""

from __future__ import annotations

from array import array

import torch

from engine.batch import build_batch
from engine.models.decoder import DecoderModel
from engine.types import EndConditions, PlanRow, Request, Sequence, StepPlan, Verification

PROBE_LENGTH = 37


def row_invariant(target: DecoderModel) -> bool:
    """Compare the same rows run whole, in chunks, one by one and beside neighbours.

    Uses the first few pages of the caches; nothing is published from them.
    """
    pages = min(cache.pages for cache in target.caches)
    length = min(PROBE_LENGTH, target.max_length - 1, (pages // 2) * 16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.geometry.vocab_size, (2, length), generator=generator).tolist()
    per = -(-length // 16)
    first = _sequence(tokens[0], list(range(per)))
    second = _sequence(tokens[1], list(range(per, 2 * per)))
    whole = _logits(target, [PlanRow(first, 0, length)])
    beside = _logits(target, [PlanRow(second, 0, length), PlanRow(first, 0, length)])[length:]
    single = torch.cat([_logits(target, [PlanRow(first, i, 1)]) for i in range(length)])
    chunks, start = [], 0
    for count in (2, 3, 8, 9, length):
        count = min(count, length - start)
        if count:
            chunks.append(_logits(target, [PlanRow(first, start, count)]))
            start += count
    return all(torch.equal(whole, other) for other in (beside, single, torch.cat(chunks)))


def _sequence(tokens: list[int], pages: list[int]) -> Sequence:
    request = Request("probe", tuple(tokens), EndConditions(1))
    return Sequence(request, 0, Verification.COUPLED, tokens, 0, pages=array("q", pages), prompt_length=len(tokens))


def _logits(target: DecoderModel, rows: list[PlanRow]) -> torch.Tensor:
    """Logits of every row, prompt rows too."""
    batch = build_batch(StepPlan(tuple(rows)), None, target.device)
    everything = torch.arange(batch.input_ids.shape[0], device=target.device)
    batch = batch._replace(logit_rows=everything, logit_offsets=batch.query_offsets)
    return target.forward(batch, ())[0]
