"""Optimisers, the warm-up / stable / decay schedule on a clock, and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Optimizers:
    """Muon for matrices inside the layers, AdamW for embeddings, heads, norms and biases."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.05,
        muon: bool = True,
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in named:
            inner = weight.dim() == 2 and ("layers." in name or name.endswith("fc.weight"))
            (matrices if inner and muon else others).append(weight)
        adam = torch.optim.AdamW(
            [
                {"params": [w for w in others if w.dim() >= 2], "weight_decay": weight_decay},
                {"params": [w for w in others if w.dim() < 2], "weight_decay": 0.0},
            ],
            lr=adam_lr,
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        self.parts: list[torch.optim.Optimizer] = [adam]
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=muon_lr,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                    ns_steps=5,
                )
            )
        self.base = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, scale: float) -> None:
        """One update with every learning rate multiplied by scale, then clear gradients."""
        for part, rates in zip(self.parts, self.base, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """What load needs to go on."""
        return [part.state_dict() for part in self.parts]

    def load(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of an earlier run."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def wsd(step: int, done: float, warmup: int = 60, decay: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up in steps, flat, then 1 - sqrt over the last `decay`.

    `done` is the used share of the time budget, in [0, 1].
    """
    rise = min(1.0, (step + 1) / warmup)
    start = 1.0 - decay
    fall = 1.0 if done < start else 1.0 - ((min(done, 1.0) - start) / decay) ** 0.5
    return rise * max(fall, 0.02)


def save_atomic(value: object, path: Path) -> None:
    """torch.save that a reader, or a kill, never sees half done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)
