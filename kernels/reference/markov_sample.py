"""The sequential draft head fused with sampling, in plain torch, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.reference.filters import filter_logits_
from kernels.reference.noise import exponential_rows, uniforms
from kernels.reference.verify import COUPLED, draw, pick

if TYPE_CHECKING:
    from kernels.filters import SamplingRows
    from kernels.markov_sample import HeadWeights

DRAFT = 0  # kernels.noise.Purpose


def latent(
    head: HeadWeights, state: torch.Tensor, previous: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What W2 is applied to, and the next state: previous = W1[x_{k−1}] [R, r], hidden = h_k [R, H], state [R, r]."""
    if head.step is not None:
        with torch.no_grad():
            return head.step(state, previous, hidden)
    if head.kind == "gated":
        assert head.gate_weight is not None
        gate = torch.nn.functional.linear(torch.cat([hidden, previous], -1), head.gate_weight, head.gate_bias)
        return gate.sigmoid() * previous, state
    if head.kind == "rnn":
        assert head.joint_weight is not None
        z = torch.cat([state, previous, hidden], -1)
        gate, candidate, output = torch.nn.functional.linear(z, head.joint_weight, head.joint_bias).chunk(3, -1)
        gate = gate.sigmoid()
        return output.tanh(), gate * state + (1 - gate) * candidate.tanh()
    return previous, state


def markov_sample(
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    head: HeadWeights,
    sampling: SamplingRows,
    positions: torch.Tensor,
    proposals: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Same as `kernels.markov_sample.markov_sample`, as a plain tuple."""
    count, block, vocabulary = base_logits.shape
    logits = base_logits.float().clone()
    tokens = torch.zeros((count, block), dtype=torch.int64, device=logits.device)
    log_z = torch.zeros((count, block), device=logits.device)
    confidence = torch.zeros_like(log_z) if head.confidence_weight is not None else None
    state = logits.new_zeros((count, head.rank))
    previous_token = anchors
    for k in range(block):
        h = hidden[:, k].float()
        if head.kind != "none":
            assert head.w1 is not None and head.w2 is not None
            previous = head.w1[previous_token].float()
            features, state = latent(head, state, previous, h)
            logits[:, k] += features @ head.w2.float().T
        if confidence is not None:
            assert head.confidence_weight is not None
            inputs = torch.cat([h, previous], -1) if head.confidence_with_markov else h
            confidence[:, k] = (inputs @ head.confidence_weight.float() + head.confidence_bias).sigmoid()
        step = logits[:, k]
        greedy_pick = step.nan_to_num(nan=float("-inf")).argmax(-1)
        scaled = step.clone()
        normaliser = filter_logits_(scaled, sampling)
        log_z[:, k] = torch.where((sampling.temperature > 0) & ~sampling.coupled, normaliser, 0.0)
        logits[:, k] = scaled
        u = uniforms(sampling.seed, positions + 1 + k, proposals, DRAFT)
        noise = exponential_rows(sampling.seed, positions + 1 + k, COUPLED, vocabulary)
        for i in range(count):
            if not bool(sampling.temperature[i] > 0) or not bool(normaliser[i].isfinite()):
                tokens[i, k] = greedy_pick[i]
            elif bool(sampling.coupled[i]):
                tokens[i, k] = pick(scaled[i : i + 1], noise[i : i + 1])[0]
            else:
                tokens[i, k] = draw((scaled[i] - normaliser[i]).exp(), u[i])
        previous_token = tokens[:, k]
    return tokens, logits if sampling.any_rejection else None, log_z, confidence
