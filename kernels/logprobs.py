"""Log-probabilities of chosen and most likely tokens, from the target's raw logits. Plain torch on any device."""

from __future__ import annotations

import torch


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-softmax (nats) of raw logits [L, V]: of token_ids [L] int64, and of the n most likely tokens.

    Returns chosen [L] float32, top ids [L, n] int64, top logprobs [L, n] float32, most likely first; equal logits come
    in no promised order. n may be 0 and is cut at V.
    """
    normaliser = torch.logsumexp(logits.float(), -1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None]).float() - normaliser
    values, ids = logits.topk(min(n, logits.shape[1]), -1)
    return chosen[:, 0], ids, values.float() - normaliser
