"""One request's rounds become messages; the counts follow one convention."""

from __future__ import annotations

import random

import pytest
from dspark.v1 import generation_pb2 as wire

from engine.messages import EndConditions, FinishReason, Request, TokenDelta, TokenLogprob
from server.accounting import Clock, SpeculationCounts
from server.checkpoint import Checkpoint
from server.convert import Prepared
from server.generation import Generation
from server.problems import CallError
from server.streams import Arrival


def prepared(stops: tuple[str, ...] = (), *, bound: bool = False) -> Prepared:
    end = EndConditions(max_tokens=100, stop_ids=frozenset({0}))
    return Prepared(Request("engine#1", (1, 2, 3), end), stops, context_bound=bound)


def generation(checkpoint: Checkpoint, stops: tuple[str, ...] = (), *, bound: bool = False) -> Generation:
    return Generation(prepared(stops, bound=bound), checkpoint.tokenizer, "mine", arrived=10.0)


def decode(*tokens: int, accepted: int, verified: int, drafted: int = 4, **more: object) -> TokenDelta:
    return TokenDelta(
        "engine#1", tokens=tokens, decode_round=True, drafted=drafted, verified=verified, accepted=accepted, **more
    )  # type: ignore[arg-type]


def feed(run: Generation, delta: TokenDelta, began: float, ended: float) -> list[wire.GenerateResponse]:
    return run.feed([Arrival(delta, began, ended)])


def test_a_request_becomes_started_deltas_finished(checkpoint: Checkpoint) -> None:
    ids = checkpoint.tokenizer.encode("hello world, hello")
    run = generation(checkpoint)
    messages = feed(run, TokenDelta("engine#1", cached_tokens=2), 11.0, 11.5)
    messages += feed(run, TokenDelta("engine#1", tokens=(ids[0],)), 11.5, 12.0)
    messages += feed(run, decode(*ids[1:3], accepted=1, verified=3), 12.0, 13.0)
    messages += feed(run, decode(*ids[3:4], 0, accepted=1, verified=1, finish=FinishReason.STOP_ID), 13.0, 13.25)
    assert [m.WhichOneof("event") for m in messages] == ["started", "delta", "delta", "delta", "finished"]
    assert {m.request_id for m in messages} == {"mine"}
    started, first, second, last, finished = messages
    assert (started.started.prompt_tokens, started.started.cached_tokens) == (3, 2)
    assert not first.delta.HasField("round")
    assert list(second.delta.from_draft) == [True, False]
    assert second.delta.round == wire.Round(drafted=4, verified=3, accepted=1, rounds=1)
    assert sum(second.delta.text_lengths) == len(second.delta.text)
    assert (last.delta.token_ids[-1], last.delta.text_lengths[-1]) == (0, 0)
    end = finished.finished
    assert (end.reason, end.stop_token_id) == (wire.FINISH_REASON_STOP_TOKEN, 0)
    assert end.usage == wire.Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=2)
    counts = end.speculation
    assert (counts.rounds, counts.drafted, counts.verified, counts.accepted) == (2, 8, 4, 2)
    assert counts.mean_accepted_length == 2.0
    assert list(counts.verified_by_position) == [2, 1, 1]
    assert list(counts.accepted_by_position) == [2, 0, 0]
    assert list(counts.acceptance_by_position) == [1.0, 0.0, 0.0]
    timing = end.timing
    assert (timing.queue_s, timing.ttft_s, timing.prefill_s) == (1.0, 2.0, 1.0)
    assert (timing.decode_s, timing.max_gap_s, timing.total_s) == (1.25, 1.0, 3.25)


def test_a_stop_string_ends_text_tokens_and_counts(checkpoint: Checkpoint) -> None:
    ids = [checkpoint.tokenizer.encode(word)[0] for word in ("a", "b", "c", "d", "e")]
    run = generation(checkpoint, ("bc",))
    feed(run, TokenDelta("engine#1", tokens=(ids[0],)), 0, 1)
    messages = feed(run, decode(*ids[1:], accepted=3, verified=3), 1, 2)
    delta, finished = messages[0].delta, messages[1].finished
    assert (delta.text, list(delta.token_ids)) == ("", ids[1:3])
    assert (finished.reason, finished.stop_string) == (wire.FINISH_REASON_STOP_STRING, "bc")
    assert finished.usage.completion_tokens == 3
    assert finished.speculation.accepted == 2
    assert finished.speculation.mean_accepted_length == 2.0
    assert run.done
    assert feed(run, decode(5, accepted=0, verified=0), 2, 3) == []


def test_how_rounds_cut_the_tokens_changes_nothing_that_is_promised(checkpoint: Checkpoint) -> None:
    generator = random.Random(5)
    for _ in range(100):
        ids = [generator.randrange(2, 400) for _ in range(40)]
        whole = checkpoint.tokenizer.decode(ids)
        start = generator.randrange(len(whole))
        stops = (whole[start : start + 3],)
        results = set()
        for _ in range(4):
            run = generation(checkpoint, stops)
            text, tokens, place = "", [], 0
            while not run.done:
                size = generator.randrange(1, 6)
                part = ids[place : place + size]
                place += size
                finish = FinishReason.LENGTH if place >= len(ids) else None
                for message in feed(run, decode(*part, accepted=len(part) - 1, verified=5, finish=finish), 0, 1):
                    text += message.delta.text
                    tokens += message.delta.token_ids
            usage = run.usage
            assert usage.completion_tokens == len(tokens)
            results.add((text, tuple(tokens), run.reason, usage.completion_tokens))
        assert len(results) == 1


@pytest.mark.parametrize(
    ("finish", "bound", "reason"),
    [
        (FinishReason.LENGTH, False, wire.FINISH_REASON_LENGTH),
        (FinishReason.LENGTH, True, wire.FINISH_REASON_CONTEXT),
        (FinishReason.CONTEXT, False, wire.FINISH_REASON_CONTEXT),
    ],
)
def test_reasons(checkpoint: Checkpoint, finish: FinishReason, bound: bool, reason: int) -> None:
    run = generation(checkpoint, bound=bound)
    messages = feed(run, TokenDelta("engine#1", tokens=(9,), finish=finish), 0, 1)
    assert messages[-1].finished.reason == reason


def test_numbers_that_are_not_finite_are_data_loss(checkpoint: Checkpoint) -> None:
    with pytest.raises(CallError, match="not finite") as error:
        feed(generation(checkpoint), TokenDelta("engine#1", finish=FinishReason.ERROR, error="not finite"), 0, 1)
    assert error.value.code.name == "DATA_LOSS"


def test_logprobs_leave_with_their_tokens(checkpoint: Checkpoint) -> None:
    run = generation(checkpoint)
    logprobs = (TokenLogprob(9, -0.25, ((9, -0.25), (8, -2.0))),)
    messages = feed(run, TokenDelta("engine#1", tokens=(9,), logprobs=logprobs, finish=FinishReason.LENGTH), 0, 1)
    entry = messages[1].delta.logprobs[0]
    assert (entry.token_id, entry.logprob) == (9, -0.25)
    assert [(a.token_id, a.logprob) for a in entry.alternatives] == [(9, -0.25), (8, -2.0)]


def test_acceptance_is_conditional_on_all_before() -> None:
    counts = SpeculationCounts()
    for verified, accepted in ((3, 3), (3, 1), (2, 0), (0, 0), (1, 1)):
        counts.add(committed=accepted + 1, drafted=4, verified=verified, accepted=accepted)
    assert (counts.rounds, counts.drafted, counts.verified, counts.accepted) == (5, 20, 9, 5)
    assert counts.mean_accepted_length == 2.0
    assert counts.verified_by_position == [4, 3, 2]
    assert counts.accepted_by_position == [3, 1, 1]
    assert counts.acceptance_by_position == [3 / 4, 1 / 2, 1 / 1]


def test_a_clock_that_never_ran_reads_zero() -> None:
    clock = Clock(5.0)
    assert (clock.queue_s, clock.ttft_s, clock.prefill_s, clock.decode_s, clock.max_gap_s) == (0, 0, 0, 0, 0)


def test_a_late_writer_catches_up_without_losing_anything(checkpoint: Checkpoint) -> None:
    ids = checkpoint.tokenizer.encode("hello world, naïve 漢字 🙂 done")
    last = decode(*ids[4:6], accepted=2, verified=3, finish=FinishReason.LENGTH)
    arrivals = [
        Arrival(TokenDelta("engine#1", cached_tokens=2), 11.0, 11.5),
        Arrival(TokenDelta("engine#1", tokens=(ids[0],)), 11.5, 12.0),
        Arrival(decode(*ids[1:4], accepted=2, verified=3), 12.0, 13.0),
        Arrival(last, 13.0, 14.0),
    ]
    started, both, finished = generation(checkpoint).feed(arrivals)
    assert started.started.cached_tokens == 2
    assert list(both.delta.token_ids) == ids[:6]
    assert both.delta.text == checkpoint.tokenizer.decode(ids[:6])
    assert sum(both.delta.text_lengths) == len(both.delta.text)
    assert list(both.delta.from_draft) == [False, True, True, False, True, True]
    assert both.delta.round == wire.Round(drafted=8, verified=6, accepted=4, rounds=2)
    assert finished.finished.timing.max_gap_s == 1.0


def test_what_comes_after_a_stop_string_in_the_same_message_does_not_count(checkpoint: Checkpoint) -> None:
    ids = [checkpoint.tokenizer.encode(word)[0] for word in ("a", "b", "c", "d")]
    rounds = [Arrival(decode(token, accepted=0, verified=1), 0, 1) for token in ids]
    _, delta, finished = generation(checkpoint, ("b",)).feed(rounds)
    assert (delta.delta.text, delta.delta.round.rounds) == ("a", 2)
    assert finished.finished.usage.completion_tokens == 2
