"""Text is a function of the tokens: not of how rounds cut them."""

from __future__ import annotations

import random

import pytest

from server.checkpoint import Checkpoint
from server.text import StopMatcher, TextStream
from server.tokenizer import Tokenizer

SENTENCES = [
    "hello world, hello there",
    "naïve café 漢字 🙂 done 🙂🙂",
    "def add(a, b):\n    return a + b\n\n\ndef",
    "aaaaaaaaaabaaaaaaab",
]


@pytest.fixture
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return checkpoint.tokenizer


def stream(tokenizer: Tokenizer, stops: tuple[str, ...] = (), min_tokens: int = 0) -> TextStream[int]:
    return TextStream(tokenizer.piece, stops, min_tokens)


def run(
    tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...], cuts: set[int], min_tokens: int = 0
) -> tuple[list[tuple[int, str, int]], str | None]:
    """All pieces when what is ready leaves after the tokens in `cuts`."""
    text = stream(tokenizer, stops, min_tokens)
    pieces = []
    for index, token in enumerate(ids):
        text.push(token, index)
        if index in cuts:
            pieces += text.release()
        if text.stopped is not None:
            break
    pieces += text.finish()
    return [(p.token_id, p.text, p.tag) for p in pieces], text.stopped


@pytest.mark.parametrize("sentence", SENTENCES)
def test_text_equals_the_tokenizers_own_decoding(tokenizer: Tokenizer, sentence: str) -> None:
    ids = tokenizer.encode(sentence)
    pieces, _ = run(tokenizer, ids, (), set(range(len(ids))))
    assert "".join(text for _, text, _ in pieces) == sentence == tokenizer.decode(ids)
    assert [token for token, _, _ in pieces] == ids


def test_any_bytes_decode_as_the_tokenizer_library_decodes_them(tokenizer: Tokenizer) -> None:
    generator = random.Random(1)
    for _ in range(300):
        ids = [generator.randrange(2, 400) for _ in range(generator.randrange(1, 20))]
        pieces, _ = run(tokenizer, ids, (), set(range(20)))
        expected = tokenizer._encoder.decode(ids, skip_special_tokens=True)
        assert "".join(text for _, text, _ in pieces) == expected == tokenizer.decode(ids)


def test_rounds_do_not_matter(tokenizer: Tokenizer) -> None:
    generator = random.Random(2)
    for trial in range(400):
        sentence = generator.choice(SENTENCES)
        ids = tokenizer.encode(sentence)
        if trial % 3 == 0:
            ids = [generator.randrange(2, 400) for _ in range(30)]
            sentence = tokenizer.decode(ids)
        stops = set()
        for _ in range(generator.randrange(4)):
            start = generator.randrange(len(sentence))
            stops.add(sentence[start : start + generator.randrange(1, 6)])
        order = tuple(sorted(stop for stop in stops if stop))
        cuts = {index for index in range(len(ids)) if generator.random() < generator.random()}
        assert run(tokenizer, ids, order, cuts) == run(tokenizer, ids, order, set())


def test_text_stops_where_a_plain_search_says(tokenizer: Tokenizer) -> None:
    generator = random.Random(3)
    for _ in range(300):
        sentence = generator.choice(SENTENCES)
        ids = tokenizer.encode(sentence)
        start = generator.randrange(len(sentence))
        stops = (sentence[start : start + generator.randrange(1, 5)], "ab", "\n\n")
        pieces, stopped = run(tokenizer, ids, stops, set(range(len(ids))))
        text = "".join(text for _, text, _ in pieces)
        ends = {stop: sentence.find(stop) + len(stop) for stop in stops if stop in sentence}
        first = min(ends.values())
        expected = max((stop for stop, end in ends.items() if end == first), key=len)
        assert (text, stopped) == (sentence[: first - len(expected)], expected)


def test_tokens_end_with_the_one_that_completes_the_stop(tokenizer: Tokenizer) -> None:
    ids = [token for word in ("hello", " wor", "ld", "!", "?") for token in tokenizer.encode(word)]
    pieces, stopped = run(tokenizer, ids, ("world!",), {len(ids)})
    completing = len(ids) - len(tokenizer.encode("?"))
    assert stopped == "world!"
    assert [token for token, _, _ in pieces] == ids[:completing]
    assert "".join(text for _, text, _ in pieces) == "hello "


def test_what_may_become_a_stop_is_held_with_its_tokens(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer, ("STOP END",))
    for index, token in enumerate(tokenizer.encode("hello STOP")):
        text.push(token, index)
    released = text.release()
    assert "".join(piece.text for piece in released) == "hello "
    for index, token in enumerate(tokenizer.encode(" no")):
        text.push(token, index)
    assert "".join(piece.text for piece in text.release()) == "STOP no"


def test_half_a_character_waits_for_the_other_half(tokenizer: Tokenizer) -> None:
    ids = [tokenizer._encoder.token_to_id(token) for token in _byte_tokens("é")]
    text = stream(tokenizer)
    text.push(ids[0], 0)
    assert text.release() == []
    text.push(ids[1], 1)
    assert [(p.token_id, p.text) for p in text.release()] == [(ids[0], ""), (ids[1], "é")]


def test_half_a_character_at_the_end_is_a_replacement(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer)
    text.push(tokenizer._encoder.token_to_id(_byte_tokens("é")[0]), 0)
    assert [piece.text for piece in text.finish()] == ["\ufffd"]


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a") * 6
    pieces, stopped = run(tokenizer, ids, ("aa",), {0, 1, 2, 3, 4}, min_tokens=4)
    assert (len(pieces), stopped) == (4, "aa")
    assert "".join(text for _, text, _ in pieces) == "aa"


def test_an_end_token_has_no_text(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer)
    word = tokenizer.encode("hello")[0]
    text.push(word, 0, silent=True)
    assert [(p.token_id, p.text) for p in text.finish()] == [(word, "")]
    assert text.tokens == 1


def test_matcher_finds_overlapping_beginnings() -> None:
    matcher = StopMatcher("aab")
    assert [matcher.advance(character) for character in "aaaab"] == [False, False, False, False, True]


def _byte_tokens(character: str) -> list[str]:
    from server.tokenizer import _alphabet

    names = {byte: name for name, byte in _alphabet().items()}
    return [names[byte] for byte in character.encode()]
