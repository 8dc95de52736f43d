"""What the engine asks of every drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.types import DraftBlock, StepPlan, Verdict
from engine.types import Sequence as State
from kernels.values import LayerCache


class Drafter(Protocol):
    """Proposes blocks from the target's features.

    Every position before the anchor must have been absorbed before `propose`: a context with holes
    drafts rubbish without failing, so implementations assert on it.
    """

    kind: str  # dspark, dflash, eagle3, mtp
    head: str  # none, vanilla, gated, rnn
    block_size: int  # γ
    feature_layers: tuple[int, ...]  # target layers whose outputs `absorb` needs; −1: the embedding
    has_confidence: bool
    lookahead: int  # tokens after a row that its cache entry depends on: 0, or 1 (Eagle3, MTP)

    @property
    def caches(self) -> Sequence[LayerCache]:
        """One a layer, once allocated."""
        ...

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes in the drafter's caches."""
        ...

    def allocate(self, pages: int) -> None:
        """Make the caches."""
        ...

    def propose(self, sequences: tuple[State, ...], length: int | None = None) -> DraftBlock:
        """One block for each sequence, which has pages for as many of its tokens as may be verified.

        Args:
            length: tokens a block, γ by default; the first ones are drawn from the same distribution as in a whole one.
        """
        ...

    def absorb(self, plan: StepPlan, verdict: Verdict, chosen: Sequence[int] | None = None) -> None:
        """Take in the features of every row that the verdict keeps, prompt rows too; or of some of the plan's alone.

        Args:
            chosen: places in the plan, rising.

        The token after each such row is known: the next row's, the verdict's, or, after a chunk that is not the
        prompt's last, the prompt's own.
        """
        ...
