"""Tokens to text, one token at a time: whole characters only, stop strings found in token order.

Knows nothing of rounds. A token leaves once all its bytes belong to whole characters and none of its text
could still become part of a stop string; so what a client receives is a function of the token sequence
alone, however the rounds cut it.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Tag = TypeVar("Tag")


class Piece(NamedTuple, Generic[Tag]):
    """A token on its way to the client, the characters that it completed, and what the caller tied to it."""

    token_id: int
    text: str
    tag: Tag


@dataclass(slots=True)
class _Held(Generic[Tag]):
    token_id: int
    text: str
    tag: Tag
    end_byte: int  # bytes up to and including this token
    end_character: int  # characters known when this token came


class StopMatcher:
    """Finds one string in a stream of characters (Knuth, Morris and Pratt)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0  # length of the longest prefix of the pattern that the stream ends with
        self._fallback = [0] * len(pattern)
        length = 0
        for index in range(1, len(pattern)):
            while length and pattern[index] != pattern[length]:
                length = self._fallback[length - 1]
            length += pattern[index] == pattern[length]
            self._fallback[index] = length

    def advance(self, character: str) -> bool:
        """Takes one character; True when the pattern is complete."""
        if self.matched == len(self.pattern):
            self.matched = self._fallback[-1]
        while self.matched and character != self.pattern[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += character == self.pattern[self.matched]
        return self.matched == len(self.pattern)


class TextStream(Generic[Tag]):
    """One request's text.

    Args:
        piece: the bytes of a token id.
        stops: strings that end the text; it ends before them. The first to be complete wins, the longest
            when several are complete with the same character.
        min_tokens: stop strings completed before this many tokens do not count.
    """

    def __init__(self, piece: Callable[[int], bytes], stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._piece = piece
        self._matchers = [StopMatcher(stop) for stop in stops]
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: deque[_Held[Tag]] = deque()
        self._bytes = 0
        self._characters = 0
        self.tokens = 0
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, token_id: int, tag: Tag, *, silent: bool = False) -> None:
        """Takes the next token. A `silent` one (an end token) has no text. After a stop, does nothing."""
        if self.stopped is not None:
            return
        raw = b"" if silent else self._piece(token_id)
        self.tokens += 1
        self._bytes += len(raw)
        self._held.append(_Held(token_id, "", tag, self._bytes, 0))
        self._extend(self._decoder.decode(raw))

    def release(self) -> list[Piece[Tag]]:
        """Tokens that may leave now, in order."""
        if self.stopped is None:
            whole_bytes = self._bytes - len(self._decoder.getstate()[0])
            # Text from here on may yet turn out to be the start of a stop string.
            safe = self._characters - max((matcher.matched for matcher in self._matchers), default=0)
        else:
            whole_bytes, safe = self._bytes, self._characters
        pieces = []
        while self._held and self._held[0].end_byte <= whole_bytes and self._held[0].end_character <= safe:
            held = self._held.popleft()
            pieces.append(Piece(held.token_id, held.text, held.tag))
        return pieces

    def finish(self) -> list[Piece[Tag]]:
        """The rest: nothing follows. Bytes that never became a character are U+FFFD of the last token."""
        if self.stopped is None and self._held:
            self._held[-1].text += self._decoder.decode(b"", final=True)
        for matcher in self._matchers:
            matcher.matched = 0
        return self.release()

    def _extend(self, characters: str) -> None:
        """Gives `characters` to the last held token, up to the first stop string."""
        last = self._held[-1]
        if not self._matchers:
            last.text += characters
            self._characters += len(characters)
            last.end_character = self._characters
            return
        for character in characters:
            self._characters += 1
            complete = [m.pattern for m in self._matchers if m.advance(character)]
            last.text += character
            if complete and self.tokens >= self._min_tokens:
                self.stopped = max(complete, key=len)
                break
        last.end_character = self._characters
        if self.stopped is not None:
            self._cut(len(self.stopped))

    def _cut(self, count: int) -> None:
        """Takes the last `count` characters away; their tokens stay, with less text."""
        for held in reversed(self._held):
            taken = min(count, len(held.text))
            held.text = held.text[: len(held.text) - taken]
            count -= taken
