"""A weight in the layout that its products want."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PANEL = 32  # columns a panel of a packed matrix
FULL, HALVED, PAIRED, TILED = range(4)  # forms of a panel, see PackedMatrix


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight y = x Wᵀ, W [N, K], in the layout that its device and dtype multiply fastest.

    Exactly one of `weight` and `panels` is set. Panel p holds W[32p : 32p + 32], k by k; missing rows are zero.
    FULL panels are float32 [N/32, K, 32]. HALVED ones serve float32 weights whose every entry is a bfloat16: int32
    [N/32, K, 16], the low half of lane j being row 32p + j and the high half row 32p + 16 + j; widening is exact,
    so both give the same bits. PAIRED ones serve bfloat16 products, which round x to bfloat16 as well and sum in
    float32: int32 [N/32, K/2, 32], lane j being row 32p + j, its low half at 2k and its high half at 2k + 1.
    TILED ones are the same words, for processors that multiply tiles of rows (kernels.amx); K is a multiple of 32.
    """

    n: int
    k: int
    weight: Tensor | None  # [N, K]
    panels: Tensor | None
    form: int = FULL
    address: int = field(init=False, repr=False, compare=False)  # of the panels; 0 where there are none

    def __post_init__(self) -> None:
        if (self.weight is None) == (self.panels is None):
            raise ValueError("a packed matrix holds either a weight or panels")
        object.__setattr__(self, "address", self.panels.data_ptr() if self.panels is not None else 0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.weight is None else self.weight.dtype

    @property
    def device(self) -> torch.device:
        held = self.panels if self.weight is None else self.weight
        assert held is not None
        return held.device

    def dense(self) -> Tensor:
        """The weight as [N, K]; unpacks a copy when only panels are held."""
        if self.weight is not None:
            return self.weight
        assert self.panels is not None
        columns = self.panels
        if self.form != FULL:
            low, high = (half.view(torch.float32) for half in (self.panels << 16, self.panels & -65536))
            columns = torch.cat([low, high], 2) if self.form == HALVED else torch.stack([low, high], 2).flatten(1, 2)
        return columns.transpose(1, 2).flatten(0, 1)[: self.n, : self.k]
