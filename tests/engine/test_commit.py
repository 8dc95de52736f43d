"""Where sequences end, inside a block or between blocks; and that ending, or cancelling, gives everything back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

from engine.engine import Engine
from engine.errors import InvalidRequest, QueueFull
from engine.types import EndConditions, FinishReason, Request, Sampling, Speculation, SpeculationMode
from tests.engine.helpers import FIXED, GREEDY, coupled, generate, load, request, run, scripted, text

Drafters = Callable[..., Path]
PROMPT = (5, 17, 2, 33, 61, 8)


@pytest.fixture(scope="module")
def plain(target_dir: Path) -> list[int]:
    return text(load(target_dir), request("a", PROMPT, 60, coupled(12)))


@pytest.fixture(scope="module")
def perfect(target_dir: Path, plain: list[int]) -> Engine:
    """Its drafts are always right: six tokens a round."""
    return scripted(target_dir, {PROMPT: plain}, block=5)


def first_uses(tokens: list[int]) -> list[tuple[int, int]]:
    """(index, token) where a token appears for the first time."""
    return [(i, token) for i, token in enumerate(tokens) if token not in tokens[:i]]


def test_perfect_drafts_are_all_accepted(perfect: Engine, plain: list[int]) -> None:
    result = run(perfect, [request("a", PROMPT, 60, coupled(12))])["a"]
    assert result.tokens == plain
    rounds = [delta for delta in result.deltas if delta.decode_round]
    assert [len(delta.tokens) for delta in rounds] == [6] * 9 + [5]
    assert result.drafted_tokens_kept == sum(delta.verified for delta in rounds) == 49


def test_stop_ids_end_at_every_place_of_a_block(perfect: Engine, plain: list[int]) -> None:
    """The stop token is the last one out, whatever the block held after it; counts follow the truncation."""
    for index, token in first_uses(plain)[:20]:
        result = run(perfect, [request("a", PROMPT, 60, coupled(12), stop_ids=[token])])["a"]
        assert result.tokens == plain[: index + 1]
        assert result.finish is FinishReason.STOP_ID
        for delta in result.deltas:
            assert delta.accepted <= min(len(delta.tokens), delta.verified)


def test_without_the_id_it_goes_on(perfect: Engine, plain: list[int]) -> None:
    result = run(perfect, [request("a", PROMPT, 60, coupled(12), stop_ids=set(range(96)) - set(plain))])["a"]
    assert (result.tokens, result.finish) == (plain, FinishReason.LENGTH)


@pytest.mark.parametrize("tokens", range(1, 15))
def test_max_tokens(perfect: Engine, plain: list[int], tokens: int) -> None:
    result = run(perfect, [request("a", PROMPT, tokens, coupled(12))])["a"]
    assert (result.tokens, result.finish) == (plain[:tokens], FinishReason.LENGTH)


@pytest.mark.parametrize("room", range(1, 15))
def test_context(target_dir: Path, plain: list[int], room: int) -> None:
    engine = scripted(target_dir, {PROMPT: plain}, max_model_len=len(PROMPT) + room)
    result = run(engine, [request("a", PROMPT, 60, coupled(12))])["a"]
    assert (result.tokens, result.finish) == (plain[:room], FinishReason.CONTEXT)


@pytest.mark.parametrize("least", [0, 1, 6, 7, 20])
def test_min_tokens_masks_the_stop_ids(hf_target: Qwen3ForCausalLM, target_dir: Path, least: int) -> None:
    """As transformers' min_new_tokens, the drafts of the block counted."""
    free = generate(hf_target, PROMPT, 30)
    stop = {free[2], free[5], free[9]}
    expected = generate(hf_target, PROMPT, 30, eos_token_id=sorted(stop), min_new_tokens=least)
    engine = scripted(target_dir, {PROMPT: expected})
    result = run(engine, [request("a", PROMPT, 30, GREEDY, FIXED, stop_ids=stop, min_tokens=least)])["a"]
    assert result.tokens == expected
    assert len(result.tokens) >= least
    assert result.finish is (FinishReason.STOP_ID if expected[-1] in stop else FinishReason.LENGTH)
    assert sum(d.verified for d in result.deltas) == result.drafted_tokens_kept, "a drafted token was judged unmasked"


@pytest.mark.parametrize("least", range(14))
def test_the_mask_lifts_at_its_position_inside_a_block(target_dir: Path, least: int) -> None:
    """A stop token that wins wherever it may ends the text as early as min_tokens allows, anywhere in a block."""
    sampling = Sampling(temperature=0.0, logit_bias=((9, 50.0),))
    wish = {"stop_ids": [9], "min_tokens": least}
    plain = text(load(target_dir), request("a", PROMPT, 30, sampling, **wish))
    assert plain.index(9) == len(plain) - 1 == least
    engine = scripted(target_dir, {PROMPT: plain})
    result = run(engine, [request("a", PROMPT, 30, sampling, FIXED, **wish)])["a"]
    assert (result.tokens, result.finish) == (plain, FinishReason.STOP_ID)
    assert result.drafted_tokens_kept >= least - 1 - least // 6


def test_wrong_scripts_change_nothing(target_dir: Path, plain: list[int]) -> None:
    """Every third drafted token is wrong: rejections everywhere, the same text, the same ending."""
    wrong = [(token + 1) % 96 if i % 3 == 2 else token for i, token in enumerate(plain)]
    engine = scripted(target_dir, {PROMPT: wrong})
    result = run(engine, [request("a", PROMPT, 60, coupled(12))])["a"]
    assert result.tokens == plain
    assert 0 < result.drafted_tokens_kept < sum(delta.verified for delta in result.deltas)


def test_messages(perfect: Engine) -> None:
    """Admission first, then one message a round; only decode rounds say so; the finish comes with the last tokens."""
    deltas = run(perfect, [request("a", PROMPT, 14, coupled(12))])["a"].deltas
    admission, prefill, *rounds = deltas
    assert (admission.cached_tokens, admission.tokens, admission.decode_round) == (0, (), False)
    assert (len(prefill.tokens), prefill.decode_round, prefill.drafted) == (1, False, 0)
    assert all(delta.decode_round for delta in rounds)
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish is FinishReason.LENGTH


def test_cancel_frees_pages_at_once(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed", max_running=2)
    alone = text(load(target_dir), request("b", PROMPT, 20, coupled(3)))
    for name in ("a", "b", "c"):
        engine.submit(request(name, PROMPT, 20, coupled(3)))
    for _ in range(3):
        engine.step()
    assert [s.request.request_id for s in engine.running] == ["a", "b"]
    before = engine.pool.available
    held = len(engine.running[0].pages)
    engine.cancel("a")
    engine.cancel("c")
    engine.cancel("nobody")
    engine.check()
    assert engine.pool.available == before + held
    b = engine.running[0]
    while engine.has_work:
        assert all(delta.request_id == "b" for delta in engine.step())
        engine.check()
    assert b.tokens[b.prompt_length :] == alone
    assert engine.pool.available == engine.pool.total


def test_cancel_during_prefill(target_dir: Path) -> None:
    engine = load(target_dir, prefill_chunk=4, max_batch_tokens=8, max_running=4)
    engine.submit(request("a", range(60), 5))
    engine.step()
    engine.cancel("a")
    engine.check()
    assert not engine.has_work
    assert engine.pool.available == engine.pool.total
    assert engine.step() == []


def test_reset_drops_everything(target_dir: Path) -> None:
    engine = load(target_dir, max_running=2)
    for i in range(4):
        engine.submit(request(str(i), range(40), 9))
    engine.step()
    engine.reset()
    engine.check()
    assert not engine.has_work
    assert engine.pool.free == engine.pool.total
    assert text(engine, request("a", PROMPT, 5)) == text(load(target_dir), request("a", PROMPT, 5))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_only_their_request(target_dir: Path, broken: float) -> None:
    engine = load(target_dir)
    forward = engine.target.forward
    engine.submit(request("good", PROMPT, 8))
    engine.submit(request("bad", PROMPT[:3], 8))
    engine.step()

    def spoiled(batch, capture):  # type: ignore[no-untyped-def]
        logits, features = forward(batch, capture)
        logits[1, 7] = broken
        return logits, features

    engine.target.forward = spoiled  # type: ignore[method-assign]
    deltas = {delta.request_id: delta for delta in engine.step()}
    engine.target.forward = forward  # type: ignore[method-assign]
    engine.check()
    assert deltas["bad"].finish is FinishReason.ERROR
    assert "not finite" in deltas["bad"].error
    assert [s.request.request_id for s in engine.running] == ["good"]


@pytest.mark.parametrize(("field", "changes"), [
    ("prompt", {"prompt": ()}),
    ("prompt", {"prompt": (1,) * 64}),
    ("token_ids", {"prompt": (1, 96)}),
    ("token_ids", {"prompt": (-1,)}),
    ("max_tokens", {"end": EndConditions(0)}),
    ("min_tokens", {"end": EndConditions(3, 4)}),
    ("stop_token_ids", {"end": EndConditions(3, 0, frozenset({96}))}),
    ("logit_bias", {"sampling": Sampling(logit_bias=((-1, 1.0),))}),
])  # fmt: skip
def test_impossible_requests_name_the_field(target_dir: Path, field: str, changes: dict[str, object]) -> None:
    engine = load(target_dir, max_model_len=64)
    good = {"request_id": "a", "prompt": (1, 2), "end": EndConditions(3)}
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(Request(**{**good, **changes}))  # type: ignore[arg-type]
    assert caught.value.field == field
    assert not engine.has_work


def test_ids_are_unique_and_the_queue_is_bounded(target_dir: Path) -> None:
    engine = load(target_dir, max_running=1, max_queue=2)
    engine.submit(request("a", PROMPT, 3))
    with pytest.raises(InvalidRequest, match="'a' is running already"):
        engine.submit(request("a", PROMPT, 3))
    engine.step()
    for name in ("b", "c"):
        engine.submit(request(name, PROMPT, 3))
    with pytest.raises(QueueFull) as caught:
        engine.submit(request("d", PROMPT, 3))
    assert caught.value.retry_after_s > 0
    assert set(run(engine, [])) == {"a", "b", "c"}


def test_a_burst_fills_the_free_places_before_it_queues(target_dir: Path) -> None:
    """Submissions come between two rounds: who enters with the next one does not count as waiting."""
    engine = load(target_dir, max_running=4, max_queue=1)
    for name in "abcde":
        engine.submit(request(name, PROMPT, 3))
    with pytest.raises(QueueFull):
        engine.submit(request("f", PROMPT, 3))
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit(request("g", PROMPT, 3))
    assert set(run(engine, [])) == set("abcde")


def test_plain_engine_ignores_speculation(target_dir: Path, plain: list[int]) -> None:
    for mode in SpeculationMode:
        assert text(load(target_dir), request("a", PROMPT, 60, coupled(12), Speculation(mode))) == plain
