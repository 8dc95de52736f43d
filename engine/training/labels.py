"""What the target says at the rows that a loss asks about: its distribution, exact, however large the vocabulary.

Over a reduced draft vocabulary of N tokens a loss needs p_t at those N, the mass elsewhere and the target's best token.
p_t = exp(logit − log Z), where log Z runs over the whole vocabulary: a number a position that no drafter changes. So
the vocabulary is streamed once a position (`partition`), which a feature cache keeps, and a step pays for N columns.

Shapes: B sequences of T positions, D the target's width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.training.trainable import Batch

_ROWS = 512  # states multiplied with a piece of the head at once


class Label(NamedTuple):
    """The target at some rows: what `step_loss.step_terms` compares a draft with."""

    logits: Tensor  # [rows, V], or [rows, N] over a reduced draft vocabulary, fp32
    log_z: Tensor | None = None  # [rows] over the whole vocabulary, where logits are [rows, N]
    best: Tensor | None = None  # [rows] the most likely token's target id, likewise


@torch.no_grad()
def partition(states: Tensor, head: Tensor, budget: int = 2**22) -> tuple[Tensor, Tensor]:
    """(log Σ exp of the logits, the most likely token) over the whole vocabulary, piece by piece; each [M].

    Args:
        states: normed hidden states [M, D].
        head: [V, D].
        budget: logits held at once, in values.
    """
    log_z = states.new_empty(len(states), dtype=torch.float32)
    best = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    for begin in range(0, len(states), _ROWS):
        rows = states[begin : begin + _ROWS]
        top = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
        total, chosen = torch.zeros_like(top), best[begin : begin + _ROWS]
        width = max(1, budget // len(rows))
        for at in range(0, len(head), width):
            logits = F.linear(rows, head[at : at + width]).float()
            high, place = logits.max(-1)
            torch.where(high > top, place + at, chosen, out=chosen)
            above = torch.maximum(top, high)
            total = total * (top - above).exp() + logits.sub_(above[:, None]).exp_().sum(-1)
            top = above
        log_z[begin : begin + _ROWS] = top + total.log()
    return log_z, best


def everywhere(hidden: Tensor, asked: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """`partition` at each position of hidden [B, T, D] whose next token may be asked for; (log Z, best), [B, T].

    Args:
        asked: [B, T], whether token p may be asked for; log Z is +inf where the token after p may not.
    """
    wanted = torch.zeros_like(asked)
    wanted[:, :-1] = asked[:, 1:]
    log_z = hidden.new_full(asked.shape, torch.inf, dtype=torch.float32)
    best = torch.zeros(asked.shape, dtype=torch.int64, device=hidden.device)
    log_z[wanted], best[wanted] = partition(hidden[wanted], head)
    return log_z, best


class Labels:
    """The target at flat rows b·T + p of a batch, chunk by chunk.

    Args:
        rows: [M].
        wanted: [M] bool; others' labels are finite and mean nothing.
        ids: target ids [N] of a reduced draft vocabulary; None for all.
    """

    def __init__(self, batch: Batch, rows: Tensor, wanted: Tensor, ids: Tensor | None) -> None:
        self.batch, self.rows = batch, rows
        self.head = batch.shared.head if ids is None else batch.shared.head[ids]
        self.log_z = self.best = None
        if ids is not None:
            log_z, best = batch.log_z, batch.best
            if log_z is None or best is None:
                log_z, best = self._compute(rows[wanted])
            self.log_z, self.best = log_z.flatten()[rows], best.flatten()[rows]

    def _compute(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `everywhere`, at these rows alone: blocks overlap."""
        hidden, some = self.batch.hidden.flatten(0, 1), rows.unique()
        log_z = hidden.new_full((len(hidden),), torch.inf, dtype=torch.float32)
        best = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        log_z[some], best[some] = partition(hidden[some], self.batch.shared.head)
        return log_z, best

    @property
    def width(self) -> int:
        """Logits a row."""
        return len(self.head)

    @torch.no_grad()
    def at(self, part: slice) -> Label:
        """Labels of rows[part]; materialises that many rows of `width` floats."""
        logits = F.linear(self.batch.hidden.flatten(0, 1)[self.rows[part]], self.head).float()
        if self.log_z is None or self.best is None:
            return Label(logits)
        return Label(logits, self.log_z[part], self.best[part])


def spread_mass(
    target: Tensor, ids: Tensor | None, log_z: Tensor | None = None, best: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(p_t over the draft vocabulary [rows, N], or [rows, V]; the target's best token [rows]).

    Args:
        target: logits [rows, V]; with `log_z` and `best`, those over `ids` alone.
        ids: target ids [N] of a reduced draft vocabulary; None for all.
    """
    if log_z is not None and best is not None:
        return (target.float() - log_z[:, None]).exp(), best
    mass = torch.softmax(target.float(), -1)
    return mass if ids is None else mass[:, ids], target.argmax(-1)
