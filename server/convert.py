"""Requests: protobuf to engine types. Every wrong field is found here and named, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from dspark.v1 import generation_pb2 as wire

from engine.messages import (
    EndConditions,
    Request,
    Sampling,
    Speculation,
    SpeculationMode,
    Verification,
)
from server.access import own_salt
from server.problems import Violation, invalid

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SALT = 256
MIN_DETOKENIZE = 65_536  # ids that a call may decode, also where the context is shorter
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0
MIN_REPETITION, MAX_REPETITION = 1e-2, 10.0  # logits are divided by it, and must stay finite

SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)

MODES = {
    wire.SPECULATION_MODE_UNSPECIFIED: SpeculationMode.AUTO,
    wire.SPECULATION_MODE_OFF: SpeculationMode.OFF,
    wire.SPECULATION_MODE_FIXED: SpeculationMode.FIXED,
    wire.SPECULATION_MODE_THRESHOLD: SpeculationMode.THRESHOLD,
    wire.SPECULATION_MODE_AUTO: SpeculationMode.AUTO,
}
VERIFICATIONS = {
    wire.VERIFICATION_UNSPECIFIED: None,
    wire.VERIFICATION_REJECTION: Verification.REJECTION,
    wire.VERIFICATION_COUPLED: Verification.COUPLED,
}


class ModelFacts(Protocol):
    """What validation needs to know of the served model; `engine.EngineInfo` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, and what the engine does not need to know of it."""

    request: Request
    stops: tuple[str, ...]
    context_bound: bool  # no room for max_tokens, or none given: reaching the limit means a full context


class Violations:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self.found.append(Violation(field, description))

    def number(self, field: str, value: float, low: float, high: float) -> float:
        """Checks a closed range; NaN is never inside."""
        if not low <= value <= high:
            self.add(field, f"must be from {low:g} to {high:g}, got {value:g}")
        return value

    def above_zero(self, field: str, value: float, high: float) -> float:
        if not 0 < value <= high:
            self.add(field, f"must be above 0 and at most {high:g}, got {value:g}")
        return value

    def check(self) -> None:
        """Raises INVALID_ARGUMENT if anything was found."""
        if self.found:
            raise invalid(self.found)


def to_detokenize(message: wire.DetokenizeRequest, facts: ModelFacts) -> list[int]:
    """The ids of a DetokenizeRequest.

    Raises:
        CallError: INVALID_ARGUMENT for too many, or outside the vocabulary.
    """
    limit = max(MIN_DETOKENIZE, facts.max_model_len)
    if len(message.token_ids) > limit:
        raise invalid([Violation("token_ids", f"at most {limit} ids a call, got {len(message.token_ids)}")])
    return check_ids("token_ids", message.token_ids, facts.vocab_size)


def check_request_id(request_id: str) -> None:
    """Ids travel in metadata and logs, so they are short visible ASCII."""
    if len(request_id) > 128 or any(not "!" <= character <= "~" for character in request_id):
        raise invalid(
            [Violation("request_id", "must be at most 128 visible ASCII characters without spaces, or empty")]
        )


def to_request(
    message: wire.GenerateRequest, request_id: str, prompt: list[int], facts: ModelFacts, defaults: Sampling
) -> Prepared:
    """Checks everything but the prompt's source, and converts.

    Raises:
        CallError: INVALID_ARGUMENT, naming each wrong field.
    """
    bad = Violations()
    prompt_field = message.WhichOneof("prompt") or "prompt"
    room = facts.max_model_len - len(prompt)
    if not prompt:
        bad.add(prompt_field, "the prompt is empty; give at least one token")
    elif room < 1:
        bad.add(
            prompt_field,
            f"the prompt has {len(prompt)} tokens and the context holds {facts.max_model_len}, "
            f"one of them generated; shorten it to {facts.max_model_len - 1}",
        )
    sampling = to_sampling(message.sampling, facts, defaults, bad)
    speculation = _speculation(message.speculation, bad)
    stops = _stops(message.stop, bad)
    end = _end(message, max(room, 1), facts, bad)
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None and logprobs > min(MAX_LOGPROBS, facts.vocab_size):
        bad.add("logprobs", f"at most {min(MAX_LOGPROBS, facts.vocab_size)} alternatives, got {logprobs}")
    if not (math.isfinite(message.min_tokens_per_s) and message.min_tokens_per_s >= 0):
        bad.add("min_tokens_per_s", f"must be a finite speed, 0 for none, got {message.min_tokens_per_s:g}")
    if len(message.cache_salt) > MAX_SALT:
        bad.add("cache_salt", f"at most {MAX_SALT} characters, got {len(message.cache_salt)}")
    bad.check()
    request = Request(
        request_id=request_id,
        prompt=tuple(prompt),
        end=end,
        sampling=sampling,
        speculation=speculation,
        logprobs=logprobs,
        priority=message.priority,
        min_tokens_per_s=message.min_tokens_per_s,
        cache_salt=own_salt(message.cache_salt),
    )
    bounded = not message.HasField("max_tokens") or message.max_tokens > room
    return Prepared(request, stops, context_bound=bounded)


def check_ids(field: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """Token ids inside the vocabulary.

    Raises:
        CallError: INVALID_ARGUMENT naming the first that are not.
    """
    bad = Violations()
    checked = list(ids)
    _ids(field, checked, vocab_size, bad)
    bad.check()
    return checked


def _ids(field: str, ids: Iterable[int], vocab_size: int, bad: Violations) -> None:
    outside = ((index, token) for index, token in enumerate(ids) if token >= vocab_size)
    for (index, token), _ in zip(outside, range(4), strict=False):
        bad.add(f"{field}[{index}]", f"token id {token} is not below the vocabulary's {vocab_size}")


def to_sampling(message: wire.Sampling, facts: ModelFacts, defaults: Sampling, bad: Violations) -> Sampling:
    """Present fields over the model's defaults."""
    given: dict[str, float] = {}
    for name in SAMPLING_FIELDS:
        if message.HasField(name):  # type: ignore[arg-type]  # the stub lists literals
            given[name] = getattr(message, name)
    at = "sampling."
    temperature = given.get("temperature", 0.0)
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        bad.add(
            at + "temperature",
            f"must be 0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, got {temperature:g}",
        )
    if "top_p" in given:
        bad.above_zero(at + "top_p", given["top_p"], 1)
    if "min_p" in given:
        bad.number(at + "min_p", given["min_p"], 0, 1)
    if "repetition_penalty" in given:
        bad.number(at + "repetition_penalty", given["repetition_penalty"], MIN_REPETITION, MAX_REPETITION)
    for name in ("presence_penalty", "frequency_penalty"):
        if name in given:
            bad.number(at + name, given[name], -2, 2)
    if len(message.logit_bias) > MAX_LOGIT_BIAS:
        bad.add(at + "logit_bias", f"at most {MAX_LOGIT_BIAS} entries, got {len(message.logit_bias)}")
    else:
        for token, bias in sorted(message.logit_bias.items()):
            if token >= facts.vocab_size:
                bad.add(f"{at}logit_bias[{token}]", f"token id is not below the vocabulary's {facts.vocab_size}")
            else:
                bad.number(f"{at}logit_bias[{token}]", bias, -100, 100)
    if "top_k" in given:
        given["top_k"] = min(int(given["top_k"]), facts.vocab_size)
    return replace(defaults, **given, logit_bias=tuple(sorted(message.logit_bias.items())))  # type: ignore[arg-type]


def _speculation(message: wire.Speculation, bad: Violations) -> Speculation:
    at = "speculation."
    mode = MODES.get(message.mode)
    if mode is None:
        bad.add(at + "mode", f"unknown number {message.mode}; see SpeculationMode")
    if message.verification not in VERIFICATIONS:
        bad.add(at + "verification", f"unknown number {message.verification}; see Verification")
    threshold: float | None = None
    if message.HasField("confidence_threshold"):
        threshold = bad.number(at + "confidence_threshold", message.confidence_threshold, 0, 1)
    return Speculation(
        mode=mode or SpeculationMode.AUTO,
        draft_tokens=message.draft_tokens if message.HasField("draft_tokens") else None,
        confidence_threshold=threshold,
        max_draft_tokens=message.max_draft_tokens if message.HasField("max_draft_tokens") else None,
        verification=VERIFICATIONS.get(message.verification),
    )


def _stops(stops: Collection[str], bad: Violations) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        bad.add("stop", f"at most {MAX_STOPS} strings, got {len(stops)}")
        return ()
    checked = tuple(stops)
    for index, stop in enumerate(checked):
        if not stop:
            bad.add(f"stop[{index}]", "is empty; leave it out")
        elif len(stop) > MAX_STOP_CHARACTERS:
            bad.add(f"stop[{index}]", f"at most {MAX_STOP_CHARACTERS} characters, got {len(stop)}")
    return tuple(dict.fromkeys(checked))


def _end(message: wire.GenerateRequest, room: int, facts: ModelFacts, bad: Violations) -> EndConditions:
    max_tokens = room
    if message.HasField("max_tokens"):
        if message.max_tokens < 1:
            bad.add("max_tokens", "must be at least 1; leave it out for as many as the context holds")
        max_tokens = min(message.max_tokens, room)
    if message.min_tokens > max_tokens:
        bad.add("min_tokens", f"must not exceed the {max_tokens} that can be generated, got {message.min_tokens}")
    if len(message.stop_token_ids) > MAX_STOP_IDS:
        bad.add("stop_token_ids", f"at most {MAX_STOP_IDS} ids, got {len(message.stop_token_ids)}")
    else:
        _ids("stop_token_ids", message.stop_token_ids, facts.vocab_size, bad)
    stop_ids = frozenset(message.stop_token_ids)
    if not message.ignore_eos:
        stop_ids |= frozenset(facts.eos_ids)
    return EndConditions(max_tokens=max_tokens, min_tokens=message.min_tokens, stop_ids=stop_ids)
