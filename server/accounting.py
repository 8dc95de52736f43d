"""What a request's rounds did, counted by one convention.

Decode rounds only: prefill is not one, a round without a draft is. The mean accepted length includes the
target's own token of each round.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SpeculationCounts:
    """Adds rounds up. Lists are indexed by position in the draft, 0 first."""

    rounds: int = 0
    skipped: int = 0  # rounds that drafted nothing
    committed: int = 0  # tokens of decode rounds
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    verified_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    reached_by_position: list[int] = field(default_factory=list)  # verified, with all before accepted

    def add(self, *, committed: int, drafted: int, verified: int, accepted: int) -> None:
        """Counts one decode round."""
        self.rounds += 1
        self.skipped += drafted == 0
        self.committed += committed
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted
        if (missing := verified - len(self.verified_by_position)) > 0:
            for counts in (self.verified_by_position, self.accepted_by_position, self.reached_by_position):
                counts.extend([0] * missing)
        for position in range(verified):
            self.verified_by_position[position] += 1
            self.accepted_by_position[position] += position < accepted
            self.reached_by_position[position] += position <= accepted

    @property
    def mean_accepted_length(self) -> float:
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def mean_verify_budget(self) -> float:
        return self.verified / self.rounds if self.rounds else 0.0

    @property
    def draft_skip_share(self) -> float:
        return self.skipped / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        pairs = zip(self.accepted_by_position, self.reached_by_position, strict=True)
        return [accepted / reached if reached else 0.0 for accepted, reached in pairs]


@dataclass(slots=True)
class Clock:
    """When things happened to a request, in seconds of one monotonic clock."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    max_gap_s: float = 0.0

    def admit(self, now: float) -> None:
        """Its first round began."""
        if self.admitted is None:
            self.admitted = now

    def token(self, now: float) -> None:
        """A round gave tokens."""
        if self.last_token is not None:
            self.max_gap_s = max(self.max_gap_s, now - self.last_token)
        if self.first_token is None:
            self.first_token = now
        self.last_token = now

    @property
    def queue_s(self) -> float:
        return max(self.admitted - self.arrived, 0.0) if self.admitted is not None else 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token - self.arrived if self.first_token is not None else 0.0

    @property
    def prefill_s(self) -> float:
        return max(self.ttft_s - self.queue_s, 0.0)

    @property
    def decode_s(self) -> float:
        if self.first_token is None or self.last_token is None:
            return 0.0
        return self.last_token - self.first_token
