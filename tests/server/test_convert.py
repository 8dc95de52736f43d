"""Every wrong field of a request is named, and a right one arrives unchanged."""

from __future__ import annotations

from typing import Any

import pytest
from dspark.v1 import generation_pb2 as wire
from google.rpc import error_details_pb2

from engine.messages import EndConditions, Sampling, SpeculationMode, Verification
from server.convert import Prepared, check_request_id, to_request
from server.problems import CallError
from tests.server.fake_engine import info

FACTS = info(vocab_size=400, max_model_len=64)
DEFAULTS = Sampling(temperature=0.6, top_k=20, top_p=0.95)
PROMPT = [5, 6, 7]
NAN, INF = float("nan"), float("inf")


def convert(message: wire.GenerateRequest, prompt: list[int] | None = None) -> Prepared:
    return to_request(message, "me", PROMPT if prompt is None else prompt, FACTS, DEFAULTS)


def request(**fields: Any) -> wire.GenerateRequest:
    return wire.GenerateRequest(text="x", **fields)


def sampling(**fields: Any) -> wire.GenerateRequest:
    return request(sampling=wire.Sampling(**fields))


def speculation(**fields: Any) -> wire.GenerateRequest:
    return request(speculation=wire.Speculation(**fields))


def violations(error: CallError) -> list[str]:
    bad = error.details[0]
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert all(violation.description for violation in bad.field_violations)
    return [violation.field for violation in bad.field_violations]


WRONG = [
    *[(sampling(temperature=value), "sampling.temperature") for value in (-1, NAN, INF, -INF, 1e-9, 1e6)],
    *[(sampling(top_p=value), "sampling.top_p") for value in (0, -0.1, 1.1, NAN, INF)],
    *[(sampling(min_p=value), "sampling.min_p") for value in (-0.1, 1.1, NAN)],
    *[(sampling(repetition_penalty=value), "sampling.repetition_penalty") for value in (0, -1, 1e-45, 11, NAN, INF)],
    *[(sampling(presence_penalty=value), "sampling.presence_penalty") for value in (-3, 3, NAN)],
    *[(sampling(frequency_penalty=value), "sampling.frequency_penalty") for value in (-3, 3, INF)],
    (sampling(logit_bias={400: 1}), "sampling.logit_bias[400]"),
    (sampling(logit_bias={3: NAN}), "sampling.logit_bias[3]"),
    (sampling(logit_bias={3: 101}), "sampling.logit_bias[3]"),
    (sampling(logit_bias=dict.fromkeys(range(2000), 1.0)), "sampling.logit_bias"),
    (request(stop=[""]), "stop[0]"),
    (request(stop=["fine", "x" * 257]), "stop[1]"),
    (request(stop=[str(i) for i in range(17)]), "stop"),
    (request(stop_token_ids=[1, 400]), "stop_token_ids[1]"),
    (request(stop_token_ids=[2**32 - 1]), "stop_token_ids[0]"),
    (request(stop_token_ids=range(300)), "stop_token_ids"),
    (request(max_tokens=0), "max_tokens"),
    (request(max_tokens=3, min_tokens=4), "min_tokens"),
    (request(min_tokens=62), "min_tokens"),
    (request(logprobs=21), "logprobs"),
    *[(request(min_tokens_per_s=value), "min_tokens_per_s") for value in (-1, NAN, INF)],
    (request(cache_salt="s" * 257), "cache_salt"),
    (speculation(mode=9), "speculation.mode"),
    (speculation(verification=7), "speculation.verification"),
    *[(speculation(confidence_threshold=v), "speculation.confidence_threshold") for v in (-0.1, 1.5, NAN)],
]


@pytest.mark.parametrize(("message", "field"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_field_is_named(message: wire.GenerateRequest, field: str) -> None:
    with pytest.raises(CallError) as error:
        convert(message)
    assert error.value.code.name == "INVALID_ARGUMENT"
    assert violations(error.value) == [field]
    assert field in error.value.message


def test_all_wrong_fields_are_named_at_once() -> None:
    message = sampling(temperature=-1, top_p=2)
    message.max_tokens = 0
    message.stop.append("")
    with pytest.raises(CallError) as error:
        convert(message)
    assert set(violations(error.value)) == {"sampling.temperature", "sampling.top_p", "max_tokens", "stop[0]"}


@pytest.mark.parametrize("prompt", [[], [1] * 64, [1] * 1000])
def test_a_prompt_without_tokens_or_without_room_is_refused(prompt: list[int]) -> None:
    with pytest.raises(CallError) as error:
        convert(request(), prompt)
    assert violations(error.value) == ["text"]


def test_absent_means_the_models_own_and_zero_means_zero() -> None:
    assert convert(request()).request.sampling == DEFAULTS
    zero = convert(sampling(temperature=0, top_k=0, min_p=0, seed=0)).request.sampling
    assert zero == Sampling(temperature=0, top_k=0, top_p=0.95, min_p=0, seed=0)


def test_numbers_arrive_exactly() -> None:
    given = {
        "temperature": 0.7,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.3,
        "frequency_penalty": 0.2,
        "seed": 2**64 - 1,
    }
    converted = convert(sampling(**given, logit_bias={9: -100, 3: 0.1})).request.sampling
    assert converted == Sampling(**given, logit_bias=((3, 0.1), (9, -100.0)))


def test_top_k_beyond_the_vocabulary_keeps_all_of_it() -> None:
    assert convert(sampling(top_k=2**32 - 1)).request.sampling.top_k == 400


def test_end_conditions() -> None:
    assert convert(request()).request.end == EndConditions(61, 0, frozenset({0}))
    message = request(max_tokens=9, min_tokens=2, stop_token_ids=[4, 5], ignore_eos=True)
    assert convert(message).request.end == EndConditions(9, 2, frozenset({4, 5}))
    assert not convert(message).context_bound
    assert convert(request(max_tokens=1000)).request.end.max_tokens == 61
    assert convert(request(max_tokens=1000)).context_bound
    assert convert(request()).context_bound


def test_speculation() -> None:
    assert convert(request()).request.speculation.mode is SpeculationMode.AUTO
    message = speculation(
        mode=wire.SPECULATION_MODE_FIXED, draft_tokens=0, max_draft_tokens=3, verification=wire.VERIFICATION_COUPLED
    )
    converted = convert(message).request.speculation
    assert converted.mode is SpeculationMode.FIXED
    assert (converted.draft_tokens, converted.max_draft_tokens, converted.confidence_threshold) == (0, 3, None)
    assert converted.verification is Verification.COUPLED


def test_the_rest() -> None:
    message = request(logprobs=0, priority=-3, min_tokens_per_s=1.5, cache_salt="team", stop=["b", "a", "b"])
    prepared = convert(message)
    converted = prepared.request
    assert (converted.request_id, converted.prompt, converted.logprobs) == ("me", (5, 6, 7), 0)
    assert (converted.priority, converted.min_tokens_per_s, converted.cache_salt) == (-3, 1.5, "team")
    assert prepared.stops == ("b", "a")
    assert convert(request()).request.logprobs is None


@pytest.mark.parametrize("name", ["x" * 129, "two words", "café", "tab\t"])
def test_request_ids_must_travel(name: str) -> None:
    check_request_id("fine-1:2/3")
    with pytest.raises(CallError):
        check_request_id(name)
