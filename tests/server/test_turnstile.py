"""A tenant's share when its limits change while generations run and wait."""

from __future__ import annotations

import asyncio

import pytest

from server.problems import CallError
from server.turnstile import Turnstile


class Door:
    """Generations that are let in and leave when told."""

    def __init__(self) -> None:
        self.turnstile = Turnstile()
        self.inside: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def arrive(self, name: str, limit: int | None, queue: int | None = None) -> None:
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._pass(name, limit, queue))
        await settle()

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await settle()

    async def _pass(self, name: str, limit: int | None, queue: int | None) -> None:
        async with self.turnstile.turn(0, limit, queue):
            self.inside.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.inside.remove(name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_lower_limit_holds_although_some_wait() -> None:
    door = Door()
    for name in "abcd":
        await door.arrive(name, 2)
    assert door.inside == ["a", "b"]
    await door.arrive("e", 1)
    await door.leave("a")
    assert door.inside == ["b"]
    await door.leave("b")
    assert door.inside == ["c"]
    for name in "cde":
        assert door.inside == [name]
        await door.leave(name)
    assert door.turnstile.running == 0


async def test_a_higher_limit_lets_those_in_first_who_wait() -> None:
    door = Door()
    for name in "abc":
        await door.arrive(name, 1)
    assert door.inside == ["a"]
    await door.arrive("d", 3)
    assert door.inside == ["a", "b", "c"]
    await door.leave("b")
    assert door.inside == ["a", "c", "d"]
    await door.arrive("e", None)
    assert door.inside == ["a", "c", "d", "e"]


async def test_who_gives_up_takes_no_place_with_him() -> None:
    door = Door()
    for name in "abc":
        await door.arrive(name, 1, 2)
    with pytest.raises(CallError, match="1 generations running and 2 waiting"):
        async with door.turnstile.turn(0, 1, 2):
            pass
    await door.leave("a")
    door.tasks["b"].cancel()  # it has a place by now
    door.tasks["c"].cancel()
    await settle()
    assert door.turnstile.running == 0
    await door.arrive("d", 1, 0)
    assert door.inside == ["d"]


async def test_a_place_that_comes_with_the_cancellation_is_handed_on() -> None:
    door = Door()
    for name in "abc":
        await door.arrive(name, 1)
    door._leave["a"].set()
    while door.turnstile.waiting == 2:  # noqa: ASYNC110  # until b has been given the place, and not yet taken it
        await asyncio.sleep(0)
    door.tasks["b"].cancel()
    await settle()
    assert door.inside == ["c"]
