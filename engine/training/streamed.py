"""Losses over a vocabulary without a vocabulary-wide tensor for all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Score = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


class _Streamed(torch.autograd.Function):
    """Takes each chunk's gradients as soon as its loss is known, so that only one chunk is alive."""

    @staticmethod
    def forward(ctx: Any, score: Score, parts: Sequence[slice], by_row: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        needs = [bool(need) for need in ctx.needs_input_grad[3:]]
        grads = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
        total = tensors[0].new_zeros((), dtype=torch.float32)
        found: list[tuple[Tensor, ...]] = []
        for part in parts:
            leaves = [
                (t[part] if i < by_row else t).detach().requires_grad_(need)
                for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
            ]
            with torch.set_grad_enabled(any(needs)):
                value, extras = score(part, *leaves)
            if any(needs):
                wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
                got = iter(torch.autograd.grad(value, wanted, allow_unused=True))
                for i, grad in enumerate(grads):
                    fresh = next(got) if grad is not None else None
                    if grad is not None and fresh is not None:
                        if i < by_row:
                            grad[part] = fresh
                        else:
                            grad += fresh
            total += value.detach()
            found.append(tuple(extra.detach() for extra in extras))
        ctx.save_for_backward(*[grad for grad in grads if grad is not None])
        ctx.needs = needs
        extras = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(*extras)
        return (total, *extras)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return (None, None, None, *[next(saved) * grads[0] if need else None for need in ctx.needs])


def streamed(score: Score, parts: Sequence[slice], rows: Sequence[Tensor], whole: Sequence[Tensor]) -> Any:
    """Σ over parts of `score`, differentiable in `rows` (sliced by part) and in `whole` (given to every part).

    Args:
        score: called as score(part, *rows[part], *whole); returns a scalar that is a *sum* over its rows,
            and detached values by row.

    Returns:
        (sum, values by row …), each of the values concatenated over the parts.
    """
    return _Streamed.apply(  # type: ignore[no-untyped-call]
        score, list(parts), len(rows), *rows, *whole
    )
