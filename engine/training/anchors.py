"""Which positions a step drafts from, and what each slot of their blocks is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.training.trainable import Batch


@dataclass(frozen=True)
class Blocks:
    """A anchors a sequence, γ slots each.

    Slot i of anchor n sits at n+i, is taught with the target's distribution at n+i, sees the true token
    there as its Markov input and predicts the one at n+i+1.
    """

    anchors: Tensor  # [B, A] positions n, increasing
    positions: Tensor  # [B, A, γ] n+i
    previous: Tensor  # [B, A, γ] true tokens at n+i; slot 0's is the anchor
    goals: Tensor  # [B, A, γ] true tokens at n+i+1
    rows: Tensor  # [B, A, γ] flat rows b·T + n+i of the target's outputs
    valid: Tensor  # [B, A, γ] bool, a contiguous prefix of each block


def choose_anchors(batch: Batch, count: int, block: int, first: int) -> Blocks:
    """The `count` positions of each sequence with the highest draws among those whose next token may be asked for.

    Args:
        first: no anchor before this position.
    """
    tokens, mask = batch.tokens, batch.loss_mask
    length = tokens.shape[1]
    count = min(count, max(1, length - 1 - first))
    places = torch.arange(length - 1, device=tokens.device)
    usable = mask[:, 1:] & (places >= first)
    # Blocks that fit whole are preferred; a sequence too short for that still teaches what it can.
    rank = batch.draws[:, :-1] + usable.float() * 2 + (usable & (places + block < length)).float() * 2
    anchors = rank.topk(count, 1).indices.sort(1).values
    positions = anchors[..., None] + torch.arange(block, device=tokens.device)
    inside = positions + 1 < length
    here, after = positions.clamp_max(length - 1), (positions + 1).clamp_max(length - 1)
    sequence = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    valid = (mask[sequence, after] & inside & (anchors >= first)[..., None]).long().cumprod(-1).bool()
    return Blocks(anchors, positions, tokens[sequence, here], tokens[sequence, after], sequence * length + here, valid)
