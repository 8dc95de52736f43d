"""Who yields when pages run out. What a victim loses is recomputed; what it said stays said."""

from __future__ import annotations

from engine.page_groups import PageGroups
from engine.schedule.admission import order
from engine.types import Phase, Sequence


def preempt(victim: Sequence, running: list[Sequence], waiting: list[Sequence], pages: PageGroups) -> None:
    """Send a sequence back to the queue without its pages; its published pages may still be found later."""
    send_back(victim, running, waiting, pages)
    victim.preemptions += 1


def send_back(victim: Sequence, running: list[Sequence], waiting: list[Sequence], pages: PageGroups) -> None:
    """The same for one that is to begin again at once."""
    running.remove(victim)
    pages.give_back(victim)
    victim.kv_length = 0
    victim.absorbed = 0
    victim.phase = Phase.WAITING
    waiting.append(victim)


def last_in_line(running: list[Sequence]) -> Sequence:
    """The running sequence that yields first: lowest priority, then latest arrival."""
    return max(running, key=order)
