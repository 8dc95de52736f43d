"""The plain values that cross between the engine and whoever calls it: frozen, picklable, free of tensors.

Whoever only passes these on, such as the server's front process, need not load PyTorch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple


class SpeculationMode(enum.Enum):
    OFF = "off"
    FIXED = "fixed"
    THRESHOLD = "threshold"
    AUTO = "auto"


class Verification(enum.Enum):
    REJECTION = "rejection"
    COUPLED = "coupled"


class FinishReason(enum.Enum):
    STOP_ID = "stop_id"  # the model's end token, or one of the request's stop ids
    LENGTH = "length"  # max_tokens reached
    CONTEXT = "context"  # the model's context is full
    ERROR = "error"  # the engine could not go on with this request


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request samples. Neutral values switch a filter off: top_k 0, top_p 1, min_p 0."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # 64 bits; None: the engine draws one

    edits_logits: bool = field(init=False, repr=False, compare=False)  # by the tokens generated so far, or a bias

    def __post_init__(self) -> None:
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        object.__setattr__(self, "edits_logits", bool(penalties or self.logit_bias))


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a request wants of speculation; None leaves the choice to the engine's policy."""

    mode: SpeculationMode = SpeculationMode.AUTO
    draft_tokens: int | None = None  # FIXED: this many
    confidence_threshold: float | None = None  # THRESHOLD: verify while confidence is at least this
    max_draft_tokens: int | None = None  # a cap under every mode
    verification: Verification | None = None  # None: COUPLED with a seed, REJECTION without


@dataclass(frozen=True, slots=True)
class EndConditions:
    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()  # the model's end tokens included, unless ignored


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `request_id` is unique among the unfinished requests of an engine."""

    request_id: str
    prompt: tuple[int, ...]
    end: EndConditions
    sampling: Sampling = field(default_factory=Sampling)
    speculation: Speculation = field(default_factory=Speculation)
    logprobs: int | None = None  # None: none; n: the chosen token's and n alternatives
    priority: int = 0  # higher is served first
    min_tokens_per_s: float = 0.0
    cache_salt: str = ""  # prefix-cache entries are shared only under the same salt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-softmax of the target's raw logits (nats): before penalties, temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # alternatives, most likely first


class TokenDelta(NamedTuple):  # made in a quarter of a frozen dataclass's time, and many are, every round
    """What one round did for one request. Plain and picklable: it crosses to the server.

    The first `accepted` of `tokens` were drafted, the one after them is the target's own. A message with
    `cached_tokens` set and no tokens announces admission. `decode_round` is False for prefill.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str = ""  # for FinishReason.ERROR
    decode_round: bool = False
    drafted: int = 0  # tokens proposed this round
    verified: int = 0  # of these, checked by the target
    accepted: int = 0  # of these, kept
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache, at admission


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is being served; fixed once loaded."""

    model: str
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    drafter: str
    draft_model: str
    block_size: int
    head: str
    has_confidence: bool
    seed_reproducible: bool
    page_size: int
    pages_total: int
    parameters: int
    policy: str
    eos_ids: tuple[int, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy the engine is now."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    rounds: int
    policy: str = ""  # that decides now; it may have changed since the start


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What may change while an engine runs. Names and meanings are `EngineConfig`'s."""

    policy: str
    draft_tokens: int | None
    confidence_threshold: float
    max_running: int
    prefill_chunk: int
    max_queue: int
