"""Copies between host and device that nobody waits for, until a round's results are wanted one round later.

Everything runs in the order of one stream. Two buffers each way take turns: when the host fills one again, the round
that used it before is two rounds back and has been read.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.device_rounds.state import Edits, RoundState

Array = np.ndarray
_LEAST = 256  # entries of a buffer for edits


class Staging:
    """Sends edits to a state, and fetches what rounds found."""

    def __init__(self, state: RoundState) -> None:
        self.state = state
        self._cuda = state.words.is_cuda
        self._sent = [self._host(torch.int64, (2 * _LEAST,)) for _ in range(2)]
        self._found = [self._host(torch.int64, state.found.shape) for _ in range(2)]
        self._confidence = [self._host(torch.float32, state.confidence.shape) for _ in range(2)]
        self._fetched: list[torch.cuda.Event | None] = [None, None]

    def _host(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._cuda)

    def send(self, edits: Edits, turn: int) -> None:
        """Write the edits before whatever runs next: places and values of both kinds in one copy."""
        if not edits:
            return
        whole, real = len(edits.words), len(edits.numbers)
        count = whole + real
        if len(self._sent[turn]) < 2 * count:
            self._sent[turn] = self._host(torch.int64, (4 * count,))
        buffer = self._sent[turn].numpy()
        buffer[:whole], buffer[whole:count] = list(edits.words), list(edits.numbers)
        buffer[count : count + whole] = list(edits.words.values())
        buffer[count + whole : 2 * count].view(np.float64)[:] = list(edits.numbers.values())
        # In one piece: what is not contiguous would be gathered on the host first, and waited for.
        sent = self._sent[turn][: 2 * count].to(self.state.words.device, non_blocking=True)
        places, values = sent[:count], sent[count:]
        if whole:
            self.state.words.index_copy_(0, places[:whole], values[:whole])
        if real:
            numbers = values[whole:].view(torch.float64).to(torch.float32)
            self.state.numbers.index_copy_(0, places[whole:], numbers)

    def fetch(self, turn: int) -> None:
        """Copy what the last round found, once it has run."""
        self._found[turn].copy_(self.state.found, non_blocking=True)
        self._confidence[turn].copy_(self.state.confidence, non_blocking=True)
        if self._cuda:
            event = self._fetched[turn] = torch.cuda.Event()
            event.record()

    def read(self, turn: int) -> tuple[Array, Array]:
        """What a fetch brought: found [4 + γ, S] and confidence [γ, S]; waits for the device until it has."""
        event = self._fetched[turn]
        if event is not None:
            event.synchronize()
        return self._found[turn].numpy(), self._confidence[turn].numpy()
