"""What the command line shows: coloured text while it streams, and a summary after."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from clients.client import Completion, ServerError
from clients.events import Delta

DRAFTED = "\x1b[32m"  # accepted draft tokens
OWN = "\x1b[1;33m"  # the target's own
DIM = "\x1b[2m"
PLAIN = "\x1b[0m"
BAR_WIDTH = 24


def wants_colour(out: TextIO) -> bool:
    """Colour for terminals, unless NO_COLOR says otherwise; FORCE_COLOR overrules both."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return out.isatty() and not os.environ.get("NO_COLOR")


class Screen:
    """Writes a generation as it comes."""

    def __init__(self, out: TextIO | None = None, *, colour: bool | None = None) -> None:
        self._out = out or sys.stdout
        self._colour = wants_colour(self._out) if colour is None else colour

    def paint(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self._colour and text else text

    def line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def legend(self) -> None:
        """What the colours mean; nothing where there are none."""
        if self._colour:
            drafted, own = self.paint("accepted draft tokens", DRAFTED), self.paint("the target's own", OWN)
            self.line(f"{drafted} · {own}")

    def prompt(self, text: str) -> None:
        self._out.write(self.paint(text, DIM))
        self._out.flush()

    def delta(self, delta: Delta) -> None:
        if not self._colour:
            self._out.write(delta.text)
        for text, drafted in delta.runs() if self._colour else ():
            self._out.write(self.paint(text, DRAFTED if drafted else OWN))
        self._out.flush()

    def summary(self, completion: Completion) -> None:
        """Usage, speed, and a bar for each draft position's acceptance."""
        finished = completion.finished
        usage, spec, timing = finished.usage, finished.speculation, finished.timing
        self.line(
            f"{usage.completion_tokens} tokens, {finished.reason} · prompt {usage.prompt_tokens}"
            f" ({usage.cached_tokens} cached) · {completion.tokens_per_s:.0f} tokens/s"
            f" · first after {completion.ttft_s * 1000:.0f} ms · longest gap {timing.max_gap_s * 1000:.0f} ms"
        )
        self.line(
            f"rounds {spec.rounds} · drafted {spec.drafted} · verified {spec.verified} · accepted {spec.accepted}"
            f" · mean accepted length {spec.mean_accepted_length:.2f}"
        )
        rows = zip(spec.acceptance_by_position, spec.accepted_by_position, spec.verified_by_position, strict=True)
        for position, (rate, accepted, verified) in enumerate(rows, start=1):
            self.line(f"  draft {position}  {self._bar(rate)} {rate:4.0%}  ({accepted} of {verified} verified)")

    def _bar(self, rate: float) -> str:
        filled = round(rate * BAR_WIDTH)
        return self.paint("█" * filled, DRAFTED) + "·" * (BAR_WIDTH - filled)


def error_lines(error: ServerError) -> list[str]:
    """A server's refusal, readable."""
    lines = [f"error: {error.code}" + (f": {error.message}" if not error.violations else "")]
    lines += [f"  {violation.field}: {violation.description}" for violation in error.violations]
    if error.retry_after_s is not None:
        lines.append(f"  try again in {error.retry_after_s:g} s")
    if error.request_id:
        lines.append(f"  request {error.request_id}")
    return lines
