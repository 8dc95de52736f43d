"""The sequential draft head fused with sampling: base logits of a block in, drafted tokens out.

Slot k's logits are base_k + W2·f(x_{k−1}, h_k, state): f = W1[x] in the vanilla head, the others in `draft_head.py`.
The confidence of slot k reads h_k and W1[x_{k−1}], never x_k, which keeps admission non-anticipating.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels.device import has_kernels
from kernels.draft_head import HeadWeights as HeadWeights
from kernels.draft_head import gated_latent, recurrent_latent, sigmoid
from kernels.filters import SamplingRows, filter_row, scale_row
from kernels.jit import entry, native
from kernels.noise import Purpose, pick, uniform
from kernels.panel import PANEL, dot, panel_product
from kernels.reference import markov_sample as reference
from kernels.vector import draw, first_index, row_maximum


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
    vocabulary = width if head.ids is None else head.vocabulary
    tokens, log_z = np.empty((count, block), np.int64), np.zeros((count, block), np.float32)
    logits = np.empty((count, block, vocabulary) if sampling.any_rejection else (0, 0, 0), np.float32)
    confidence = np.empty((0 if head.confidence_weight is None else count, block), np.float32)
    _markov_sample(
        base_logits.contiguous().numpy(),
        hidden.contiguous().numpy(),
        anchors.numpy(),
        vocabulary,
        *head.packed,
        *sampling.filters,
        *sampling.noise,
        positions.numpy(),
        proposals.numpy(),
        tokens,
        logits,
        log_z,
        confidence,
    )
    return DraftSample(
        torch.from_numpy(tokens),
        torch.from_numpy(logits) if sampling.any_rejection else None,
        torch.from_numpy(log_z),
        None if head.confidence_weight is None else torch.from_numpy(confidence),
    )


_DRAFT, _COUPLED = int(Purpose.DRAFT), int(Purpose.COUPLED)


@entry
def _markov_sample(
    base: np.ndarray,
    hidden: np.ndarray,
    anchors: np.ndarray,
    vocabulary: int,
    kind: int,
    w1: np.ndarray,
    panels: np.ndarray,
    mix_weight: np.ndarray,
    mix_bias: np.ndarray,
    confidence_weight: np.ndarray,
    confidence_bias: np.float32,
    memo: np.ndarray,
    memo_owner: np.ndarray,
    ids: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    coupled: np.ndarray,
    positions: np.ndarray,
    proposals: np.ndarray,
    tokens: np.ndarray,
    logits: np.ndarray,
    log_z: np.ndarray,
    confidence: np.ndarray,
) -> None:
    count, block = base.shape[0], base.shape[1]
    width, rank = hidden.shape[2], w1.shape[1]
    weights, scratch = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32)
    narrow = np.empty(ids.shape[0], np.float32)
    bias_space = np.zeros(panels.shape[0] * PANEL, np.float32)
    state, latent = np.empty(rank, np.float32), np.empty(rank, np.float32)
    inputs = np.empty(mix_weight.shape[1], np.float32)
    for i in range(count):
        state[:] = 0.0
        previous = anchors[i]
        for k in range(block):
            h = hidden[i, k]
            kept = temperature[i] > 0 and not coupled[i]
            row = logits[i, k] if kept else scratch
            own = narrow if ids.shape[0] > 0 else row
            if confidence.shape[0] > 0:
                score = confidence_bias + dot(confidence_weight[:width], h)
                if confidence_weight.shape[0] > width:
                    score += dot(confidence_weight[width:], w1[previous])
                confidence[i, k] = sigmoid(score)
            if kind == 0:
                own[:] = base[i, k]
            else:
                bias = bias_space
                if kind == 1 and memo.shape[0] > 0:
                    slot = previous % memo.shape[0]
                    bias = memo[slot]
                    if memo_owner[slot] != previous:
                        panel_product(panels, w1[previous], bias)
                        memo_owner[slot] = previous
                elif kind == 1:
                    panel_product(panels, w1[previous], bias)
                else:
                    if kind == 2:
                        gated_latent(h, w1[previous], mix_weight, mix_bias, inputs, latent)
                    else:
                        recurrent_latent(h, w1[previous], mix_weight, mix_bias, inputs, state, latent)
                    panel_product(panels, latent, bias)
                _add(base[i, k], bias, own)
            if ids.shape[0] > 0:
                row[:] = -np.inf
                for v in range(ids.shape[0]):
                    row[ids[v]] = narrow[v]
            if temperature[i] <= 0:
                token = first_index(row, row_maximum(row))
            elif not scale_row(row, temperature[i]):
                token = 0
                log_z[i, k] = np.nan
            elif coupled[i]:
                filter_row(row, weights, top_k[i], top_p[i], min_p[i], False)
                token = pick(row, seed[i], positions[i] + 1 + k, _COUPLED)
            else:
                log_z[i, k] = np.log(filter_row(row, weights, top_k[i], top_p[i], min_p[i], True))
                token = draw(weights, uniform(seed[i], positions[i] + 1 + k, proposals[i], _DRAFT))
            tokens[i, k] = token
            previous = token


@native
def _add(base: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    for v in range(out.shape[0]):
        out[v] = base[v] + bias[v]
