"""What a client sends and sees, as plain typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.v1 import generation_pb2 as wire


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, rendered by the server with the model's own template."""

    messages: Sequence[Message]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


Prompt = str | Chat | Sequence[int]  # text, a conversation, or token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate; None leaves a choice to the model or the server."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    speculation: str | None = None  # off, fixed, threshold, auto
    draft_tokens: int | None = None
    confidence_threshold: float | None = None
    max_draft_tokens: int | None = None
    verification: str | None = None  # rejection, coupled
    priority: int = 0
    min_tokens_per_s: float = 0.0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    drafted: int
    verified: int
    accepted: int
    rounds: int = 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one round released. `round` is None for the token that comes out of prefill."""

    text: str
    token_ids: tuple[int, ...]
    text_lengths: tuple[int, ...]  # characters of each token
    from_draft: tuple[bool, ...]
    logprobs: tuple[TokenLogprob, ...]
    round: Round | None

    def runs(self) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it was drafted; neighbours of one kind are one piece."""
        pieces: list[tuple[str, bool]] = []
        start = 0
        for length, drafted in zip(self.text_lengths, self.from_draft, strict=True):
            part = self.text[start : start + length]
            start += length
            if pieces and pieces[-1][1] == drafted:
                pieces[-1] = (pieces[-1][0] + part, drafted)
            elif part:
                pieces.append((part, drafted))
        return pieces


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Speculation:
    """Counts of decode rounds; lists are indexed by position in the draft."""

    rounds: int
    drafted: int
    verified: int
    accepted: int
    mean_accepted_length: float
    verified_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    acceptance_by_position: tuple[float, ...]
    mean_verify_budget: float = 0.0  # draft tokens verified ÷ rounds
    draft_skip_share: float = 0.0  # rounds that drafted nothing ÷ rounds


@dataclass(frozen=True, slots=True)
class ServerTiming:
    """Seconds, by the server's clock."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    ttft_s: float
    max_gap_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The end, and the sums."""

    reason: str  # stop_token, stop_string, length, context
    usage: Usage
    speculation: Speculation
    timing: ServerTiming
    stop_string: str | None = None
    stop_token_id: int | None = None


Event = Started | Delta | Finished


def to_wire(prompt: Prompt, options: Options, request_id: str) -> wire.GenerateRequest:
    """The request message.

    Raises:
        ValueError: a name or number that the wire cannot carry.
    """
    request = wire.GenerateRequest(
        request_id=request_id,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        logprobs=options.logprobs,
        priority=options.priority,
        min_tokens_per_s=options.min_tokens_per_s,
        cache_salt=options.cache_salt,
        sampling=wire.Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=options.logit_bias,
            seed=options.seed,
        ),
        speculation=wire.Speculation(
            mode=wire.SpeculationMode.Value(f"SPECULATION_MODE_{(options.speculation or 'unspecified').upper()}"),
            draft_tokens=options.draft_tokens,
            confidence_threshold=options.confidence_threshold,
            max_draft_tokens=options.max_draft_tokens,
            verification=wire.Verification.Value(f"VERIFICATION_{(options.verification or 'unspecified').upper()}"),
        ),
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, Chat):
        request.chat.CopyFrom(chat_to_wire(prompt))
    else:
        request.token_ids.CopyFrom(wire.TokenIds(ids=prompt))
    return request


def chat_to_wire(chat: Chat) -> wire.Chat:
    message = wire.Chat(messages=[wire.ChatMessage(role=m.role, content=m.content) for m in chat.messages])
    if chat.template_arguments:
        message.template_arguments.update(dict(chat.template_arguments))
    return message


def from_wire(response: wire.GenerateResponse) -> Event | None:
    """The event in a response; None for one of a newer server, that this client does not know."""
    match response.WhichOneof("event"):
        case "started":
            return Started(response.started.prompt_tokens, response.started.cached_tokens)
        case "delta":
            return _delta(response.delta)
        case "finished":
            return _finished(response.finished)
    return None


def _delta(delta: wire.Delta) -> Delta:
    logprobs = tuple(
        TokenLogprob(p.token_id, p.logprob, tuple((a.token_id, a.logprob) for a in p.alternatives))
        for p in delta.logprobs
    )
    round_ = None
    if delta.HasField("round"):
        counts = delta.round
        round_ = Round(counts.drafted, counts.verified, counts.accepted, counts.rounds)
    lengths, drafted = tuple(delta.text_lengths), tuple(delta.from_draft)
    return Delta(delta.text, tuple(delta.token_ids), lengths, drafted, logprobs, round_)


def _finished(finished: wire.Finished) -> Finished:
    usage, counts, timing = finished.usage, finished.speculation, finished.timing
    return Finished(
        reason=wire.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        speculation=Speculation(
            rounds=counts.rounds,
            drafted=counts.drafted,
            verified=counts.verified,
            accepted=counts.accepted,
            mean_accepted_length=counts.mean_accepted_length,
            verified_by_position=tuple(counts.verified_by_position),
            accepted_by_position=tuple(counts.accepted_by_position),
            acceptance_by_position=tuple(counts.acceptance_by_position),
            mean_verify_budget=counts.mean_verify_budget,
            draft_skip_share=counts.draft_skip_share,
        ),
        timing=ServerTiming(
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            decode_s=timing.decode_s,
            total_s=timing.total_s,
            ttft_s=timing.ttft_s,
            max_gap_s=timing.max_gap_s,
        ),
        stop_string=finished.stop_string if finished.HasField("stop_string") else None,
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
    )
