"""The sequential draft head fused with sampling: base logits of a block in, drafted tokens out.

Slot k's logits are base_k + W2·f(x_{k−1}, h_k, state): f = W1[x] in the vanilla head, the others in `draft_head.py`.
The confidence of slot k reads h_k and W1[x_{k−1}], never x_k, which keeps admission non-anticipating.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch

from kernels.device import has_kernels
from kernels.draft_head import HeadWeights as HeadWeights
from kernels.filters import SamplingRows
from kernels.jit import entry, routine
from kernels.markov_native import KIND, fill_memo, sample_blocks
from kernels.reference import markov_sample as reference
from kernels.threads import run, stages_for


class DraftSample(NamedTuple):
    """A drafted block."""

    tokens: torch.Tensor  # [R, γ] int64
    logits: torch.Tensor | None  # [R, γ, V] float32 after temperature and filters; None unless a row needs them
    log_z: torch.Tensor  # [R, γ] float32: p_d = exp(logits − log_z); 0 in greedy and coupled rows
    confidence: torch.Tensor | None  # [R, γ] float32 in (0, 1); None without a confidence head


def markov_sample(
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    head: HeadWeights,
    sampling: SamplingRows,
    positions: torch.Tensor,
    proposals: torch.Tensor,
) -> DraftSample:
    """Draft a block for R rows: base_logits [R, γ, V] float32, hidden [R, γ, H] float32, anchors [R] int64 (x_0).

    With a reduced draft vocabulary (`head.ids`) base_logits are [R, γ, N]; tokens and returned logits are the target's
    all the same: −inf, so never drafted, where no id is, and a token's noise is that of its target id.

    `positions` [R] are the anchors' positions n; slot i decides position n + 1 + i. `proposals` [R] are the requests'
    proposal counters. Greedy rows take the argmax, rejection rows draw from softmax of the filtered logits with DRAFT
    noise, coupled rows take argmax(filtered logits − log E) with the COUPLED noise of the position. Greedy and coupled
    rows of the returned `logits` hold nothing. Non-finite logits never fail here: such a slot gets some token id,
    and in a rejection row a log_z of NaN, upon which verification rejects it and draws from the target alone.
    """
    on_device = has_kernels(base_logits)
    if on_device or base_logits.device.type != "cpu" or base_logits.dtype != torch.float32 or head.step is not None:
        arguments = (head.widen(base_logits), hidden, anchors, head.widened, sampling, positions, proposals)
        if on_device:
            from kernels.triton import markov_sample as device

            return DraftSample(*device.markov_sample(*arguments))
        return DraftSample(*reference.markov_sample(*arguments))
    count, block, width = base_logits.shape
    for given in (anchors, positions, proposals):
        if given.dtype != torch.int64 or not given.is_contiguous() or len(given) != count:
            raise ValueError("anchors, positions and proposals must be contiguous int64, one a row")
    if len(sampling) != count or hidden.shape[:2] != (count, block) or hidden.dtype != torch.float32:
        raise ValueError("hidden must be float32, a row a slot, and sampling have a row a sequence")
    base_logits, hidden = base_logits.contiguous(), hidden.contiguous()
    sample, outputs = new_sample(count, block, width, head, sampling)
    frame = array(
        "q",
        (
            *(0, count, block, width, width if head.ids is None else head.vocabulary, base_logits.data_ptr()),
            *(hidden.data_ptr(), hidden.shape[2], anchors.data_ptr(), *head.words, *sampling.addresses),
            *(positions.data_ptr(), proposals.data_ptr(), *outputs),
        ),
    )
    run(sample_frame(), frame.buffer_info()[0], stages_for(count, base_logits.numel()))
    return sample


def new_sample(
    count: int, block: int, width: int, head: HeadWeights, sampling: SamplingRows
) -> tuple[DraftSample, tuple[int, ...]]:
    """Room for what the CPU kernel draws for `count` requests, and the words by which its frame names that."""
    tokens, log_z = torch.empty((count, block), dtype=torch.int64), torch.empty((count, block))
    logits = confidence = None
    if sampling.any_rejection:
        logits = torch.empty((count, block, width if head.ids is None else head.vocabulary))
    if head.confidence_weight is not None:
        confidence = torch.empty((count, block))
    sample = DraftSample(tokens, logits, log_z, confidence)
    return sample, sample_words(sample)


def sample_words(sample: DraftSample) -> tuple[int, ...]:
    """The words by which the CPU kernel's frame names where it draws to."""
    count, logits, confidence = len(sample.tokens), sample.logits, sample.confidence
    kept = (0, 0) if logits is None else (logits.data_ptr(), count)
    sure = (0, 0) if confidence is None else (confidence.data_ptr(), count)
    return (sample.tokens.data_ptr(), *kept, sample.log_z.data_ptr(), *sure)


def remember(head: HeadWeights) -> None:
    """Work out the biases of the tokens that a vanilla head's memo has room for, before anybody drafts: on the CPU a
    bias that is not there takes as long as ten that are. No other thread may be drafting."""
    if head.kind == "vanilla" and head.w1 is not None and head.w1.is_cpu:
        frame = array("q", (*(0,) * KIND, *head.words))
        _fill(frame.buffer_info()[0])
        del frame  # not before: native code is told its address


@entry
def _fill(frame):  # type: ignore[no-untyped-def]
    fill_memo(frame)


@routine
def sample_frame(frame, worker):  # type: ignore[no-untyped-def]
    """Requests are shared out among the threads; a single one is not worth waking anybody."""
    sample_blocks(frame)
