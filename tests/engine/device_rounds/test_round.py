"""One round as a function of tensors: padding changes nothing, and rows of nobody touch nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.device_rounds.round import DeviceRound, Size
from engine.device_rounds.staging import Staging
from engine.device_rounds.state import Edits, Fate, Found, RoundState, Whole
from engine.drafters.dspark import DSparkDrafter
from engine.engine import Engine
from engine.types import Sequence
from tests.engine.device_rounds.helpers import load
from tests.engine.helpers import GREEDY, coupled, rejection, request

Drafters = Callable[..., Path]
BLOCK = 5
SAMPLINGS = (GREEDY, coupled(3), coupled(5, 0.8, top_k=20), coupled(4, top_p=0.9))  # the third by rejection


class Table:
    """Sequences whose prompts have run, and a state of its own to seat them in.

    Args:
        places: their seats.
    """

    def __init__(self, target: Path, drafter: Path, places: tuple[int, ...], seats: int = 16) -> None:
        self.engine: Engine = load(target, drafter, policy="fixed", prefix_cache=False)
        for index, sampling in enumerate(SAMPLINGS[: len(places)]):
            own = rejection() if index == 2 else None
            self.engine.submit(request(str(index), range(3 + index, 40 + 3 * index), 40, sampling, own))
        rounds, self.engine.device_rounds = self.engine.device_rounds, None
        while any(s.kv_length < s.prompt_length for s in (*self.engine.waiting, *self.engine.running)):
            self.engine.step()
        assert rounds is not None and isinstance(self.engine.drafter, DSparkDrafter)
        self.scratch = rounds.state.scratch_page
        self.state = RoundState(seats, 8, BLOCK, self.scratch, torch.device("cpu"))
        self.staging = Staging(self.state)
        self.round = DeviceRound(self.engine.target, self.engine.drafter, self.state)
        self.places = dict(zip(self.engine.running, places, strict=True))
        edits = Edits(self.state)
        for sequence, seat in self.places.items():
            self.engine.pages.grow(sequence, sequence.kv_length + 20)
            self.seat(edits, sequence, seat)
        edits.spend(1000)
        self.staging.send(edits, 0)

    def seat(self, edits: Edits, sequence: Sequence, seat: int, most: int = BLOCK, threshold: float = 0.0) -> None:
        edits.sit(seat, sequence, 120, most)
        edits.pages(seat, 0, sequence.pages)
        edits.judge(seat, 1.0, threshold)
        edits.correct(seat, np.tile([0.0, 1.0], (BLOCK, 1)))

    def run(self, size: Size) -> np.ndarray:
        """What the seats' sequences got, [sequences, 4 + γ]; drafted tokens that nobody verified are 0."""
        self.round.run(size)
        self.staging.fetch(0)
        found = self.staging.read(0)[0][:, list(self.places.values())].T.copy()
        for row in found:
            row[len(Found) + row[Found.VERIFIED] :] = 0
        return found


@pytest.fixture(scope="module")
def files(target_dir: Path, drafter_dir: Drafters) -> tuple[Path, Path]:
    return target_dir, drafter_dir()


def test_padding_and_seats_change_nothing(files: tuple[Path, Path]) -> None:
    """The same sequences on other seats, in rounds of other sizes, draft, keep and choose the same."""
    tables = Table(*files, (0, 1, 2, 3)), Table(*files, (9, 4, 0, 13)), Table(*files, (3, 2, 1, 0))
    sizes = Size(4, 24, True), Size(16, 96, True), Size(4, 31, True)
    plain = Size(4, 4, False), Size(16, 16, False), Size(4, 9, False)
    for turn in range(4):
        first, *others = (table.run(plain[i] if turn == 2 else sizes[i]) for i, table in enumerate(tables))
        assert (first[:, Found.STATE] == Fate.WENT_ON).all()
        assert (first[:, Found.VERIFIED] == (0 if turn == 2 else BLOCK)).all()
        for other in others:
            assert (other == first).all()


def test_a_rounds_rows_hold_its_budget_whatever_the_host_says(files: tuple[Path, Path]) -> None:
    table = Table(*files, (0, 5, 2, 3))
    found = table.run(Size(8, 8 + 7, True))
    assert found[:, Found.VERIFIED].sum() == 7
    edits = Edits(table.state)
    edits.spend(3)
    table.staging.send(edits, 0)
    assert table.run(Size(8, 8 + 7, True))[:, Found.VERIFIED].sum() == 3


def test_rows_of_nobody_write_to_the_scratch_page_alone(files: tuple[Path, Path]) -> None:
    """Everything but the slots that seats own stays as it was, poison included."""
    table = Table(*files, (1, 6))
    engine = table.engine
    assert isinstance(engine.drafter, DSparkDrafter)
    caches = (*engine.target.caches, *engine.drafter.caches)
    held = [page for sequence in engine.running for page in sequence.pages]
    others = [page for page in range(engine.pool.total) if page not in held]
    assert table.scratch == engine.pool.total and table.scratch not in held
    for cache in caches:
        cache.k[others], cache.v[others] = torch.nan, torch.nan
        cache.k[table.scratch], cache.v[table.scratch] = torch.nan, torch.nan
    before = [cache.k.clone() for cache in caches]
    found = table.run(Size(8, 40, True))
    assert (found[:, Found.STATE] == Fate.WENT_ON).all()
    for cache, old in zip(caches, before, strict=True):
        assert cache.k[others].isnan().all() and cache.v[others].isnan().all()
        for sequence in engine.running:
            written = sequence.kv_length
            pages = sequence.pages[: written // 16]
            assert torch.equal(cache.k[pages], old[pages]), "a position before the anchor was written"


def test_whoever_reached_the_end_or_left_is_passed_over(files: tuple[Path, Path]) -> None:
    table = Table(*files, (0, 1, 2))
    first, second, third = table.places
    edits = Edits(table.state)
    edits.words[table.state.whole_at(Whole.END, 0)] = first.kv_length + 3
    edits.leave(1)
    table.staging.send(edits, 0)
    states = []
    for _ in range(4):
        found = table.run(Size(4, 24, True))
        states.append(found[:, Found.STATE].tolist())
        assert found[0, Found.VERIFIED] <= 1, "verified more than max_tokens leaves"
    assert states[0] == [Fate.WENT_ON, Fate.IDLE, Fate.WENT_ON]
    assert states[-1] == [Fate.IDLE, Fate.IDLE, Fate.WENT_ON]
    assert int(table.state.whole[Whole.LENGTH, 0]) + 1 == first.kv_length + 3
    assert int(table.state.whole[Whole.LENGTH, 1]) == second.kv_length
    assert int(table.state.whole[Whole.PROPOSALS, 2]) == third.proposals + 4


def test_lengths_are_prefixes_by_wish_and_threshold(files: tuple[Path, Path]) -> None:
    table = Table(*files, (0, 1, 2))
    edits = Edits(table.state)
    first, second, _ = table.places
    table.seat(edits, first, 0, most=2)
    table.seat(edits, second, 1, threshold=0.8)
    table.staging.send(edits, 0)
    verified = table.run(Size(4, 24, True))[:, Found.VERIFIED]
    confidence = table.staging.read(0)[1][:, 1]
    assert verified[0] == 2 and verified[2] == BLOCK
    assert verified[1] == (confidence >= 0.8).cumprod().sum() < BLOCK


def test_logits_that_are_not_finite_are_told_and_harm_nobody_else(files: tuple[Path, Path]) -> None:
    whole, broken = Table(*files, (0, 1, 2)), Table(*files, (0, 1, 2))
    sick = list(broken.places)[1]
    for cache in broken.engine.target.caches:
        cache.k[sick.pages[0]] = torch.nan
    for _ in range(2):
        found, expected = broken.run(Size(4, 24, True)), whole.run(Size(4, 24, True))
        assert found[:, Found.STATE].tolist() == [Fate.WENT_ON, Fate.FAILED, Fate.WENT_ON]
        assert (found[[0, 2]] == expected[[0, 2]]).all()


def test_the_last_edit_of_an_entry_counts(files: tuple[Path, Path]) -> None:
    table = Table(*files, (0,))
    edits = Edits(table.state)
    edits.leave(0)
    table.seat(edits, next(iter(table.places)), 0, most=3)
    for seat in range(1, 16):
        edits.pages(seat, 0, range(8))
    table.staging.send(edits, 1)
    assert int(table.state.whole[Whole.ACTIVE, 0]) == 1 and int(table.state.whole[Whole.MOST, 0]) == 3
    assert table.state.table[2].tolist() == list(range(8)) and (table.state.table[0] == table.scratch).all()
