"""Sends a plan's requests at their times, whatever became of earlier ones, and notes what came back and when.

An open loop: users of a slow service do not wait for each other. A generator that waits for a reply before it sends the
next request asks least just when the service is slowest, and so hides its worst moments (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from clients.client import Client
from clients.errors import ServerError
from clients.events import Delta, Event, Finished, Options, Speculation, Started
from clients.load.arrivals import Arrival

WAITING, FINISHED, CANCELLED, FAILED = "waiting", "finished", "cancelled", "failed"


@dataclass(slots=True)
class Sample:
    """One request's fate. Times are seconds after the start of the run.

    Attributes:
        scheduled_s: when the plan had it arrive; latencies count from here.
        sent_s: when it was really sent.
        outcome: finished; cancelled, by us as planned; failed, then `code` says how; waiting, when the run was stopped.
        first_tokens: tokens that came with the first.
        longest_gap_s: between two messages with tokens.
    """

    request_id: str
    scheduled_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    end_s: float | None = None
    outcome: str = WAITING
    code: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_tokens: int = 0
    longest_gap_s: float | None = None
    queue_s: float | None = None
    speculation: Speculation | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, from the scheduled arrival."""
        return None if self.first_s is None else self.first_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first message with tokens; None when there was no other."""
        later = self.tokens - self.first_tokens
        return (
            None if not later or self.first_s is None or self.last_s is None else (self.last_s - self.first_s) / later
        )

    @property
    def e2e_s(self) -> float | None:
        """Time to the end, from the scheduled arrival."""
        return None if self.end_s is None else self.end_s - self.scheduled_s


class Runner:
    """Plays one plan.

    Args:
        client: should not retry, or failures are hidden.
        name: beginning of every request id.
        cold: each request gets a cache salt of its own, so that none finds another's prefix.
    """

    def __init__(self, client: Client, options: Options, *, timeout_s: float, name: str, cold: bool = False) -> None:
        self._client = client
        self._options = options
        self._timeout_s = timeout_s
        self._name = name
        self._cold = cold
        self._began = 0.0
        self.samples: list[Sample] = []
        self.tokens_by_second: Counter[int] = Counter()

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    async def run(self, plan: Sequence[Arrival]) -> None:
        """Returns when every request has ended. Cancelled, it cancels those that run; `samples` keeps what there is."""
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(plan):
                await asyncio.sleep(max(0.0, arrival.at_s - self.now_s))
                group.create_task(self._request(number, arrival))

    async def _request(self, number: int, arrival: Arrival) -> None:
        sample = Sample(f"{self._name}-{number}", arrival.at_s, sent_s=self.now_s)
        self.samples.append(sample)
        options = replace(self._options, max_tokens=arrival.max_tokens)
        if self._cold:
            options = replace(options, cache_salt=sample.request_id)
        events = self._client.generate(arrival.prompt, options, request_id=sample.request_id, timeout_s=self._timeout_s)
        try:
            async with aclosing(events):
                async for event in events:
                    self._note(sample, event)
                    if arrival.cancel_after_tokens is not None and sample.tokens >= arrival.cancel_after_tokens:
                        sample.outcome = CANCELLED
                        break
        except ServerError as error:
            sample.outcome, sample.code = FAILED, error.code
        sample.end_s = self.now_s

    def _note(self, sample: Sample, event: Event) -> None:
        now = self.now_s
        if isinstance(event, Started):
            sample.prompt_tokens, sample.cached_tokens = event.prompt_tokens, event.cached_tokens
        elif isinstance(event, Delta) and event.token_ids:
            count = len(event.token_ids)
            self.tokens_by_second[int(now)] += count
            if sample.last_s is None:
                sample.first_s, sample.first_tokens = now, count
            else:
                sample.longest_gap_s = max(sample.longest_gap_s or 0.0, now - sample.last_s)
            sample.last_s = now
            sample.tokens += count
        elif isinstance(event, Finished):
            sample.outcome, sample.reason = FINISHED, event.reason
            sample.queue_s, sample.speculation = event.timing.queue_s, event.speculation
