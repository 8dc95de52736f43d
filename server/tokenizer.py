"""The checkpoint's tokenizer: text to ids, ids to bytes.

A token's bytes are read once from the vocabulary, so that a stream of tokens becomes text without ever
decoding a prefix again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HubTokenizer


class TokenizerError(Exception):
    """The checkpoint's tokenizer cannot be used; the message names the file and the mend."""


class Tokenizer:
    """Encodes prompts, and knows the bytes of every token."""

    def __init__(self, encoder: HubTokenizer, *, source: str = "tokenizer.json") -> None:
        self._encoder = encoder
        # Parts and not the whole as JSON: that takes a second where the vocabulary has 262,144 tokens.
        decoder: Any = encoder.decoder
        to_bytes = _byte_rule(json.loads(decoder.__getstate__()) if decoder is not None else None, source)
        added = encoder.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
        self._pieces = {index: to_bytes(token) for token, index in vocabulary.items()}
        self.longest_piece = max((len(piece) for piece in self._pieces.values()), default=1)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`.

        Raises:
            TokenizerError: no such file, or one that cannot be used.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing: serve a checkpoint with a fast tokenizer")
        try:
            encoder = HubTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a corrupt file
            raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error
        # Truncation and padding saved with a training tokenizer would silently cut prompts.
        encoder.no_truncation()
        encoder.no_padding()
        return cls(encoder, source=str(path))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def piece(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes of a token; empty for a special one, and for an id without an entry."""
        if skip_special and token_id in self.special_ids:
            return b""
        return self._pieces.get(token_id, b"")

    def pieces(self, token_ids: Iterable[int]) -> list[bytes]:
        """The bytes of every token, special ones included."""
        return [self._pieces.get(token, b"") for token in token_ids]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        joined = b"".join(self.piece(token, skip_special=skip_special) for token in token_ids)
        return joined.decode("utf-8", errors="replace")


def _byte_rule(decoder: dict[str, Any] | None, source: str) -> Callable[[str], bytes]:
    """How this tokenizer's vocabulary writes bytes: the byte-level alphabet, or byte fallback."""
    kinds = _decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        return _byte_level
    if "ByteFallback" in kinds:
        return _byte_fallback
    raise TokenizerError(
        f"{source}: decoder {'/'.join(kinds) or 'none'} is not supported; byte-level and byte-fallback vocabularies are"
    )


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for child in decoder["decoders"] for kind in _decoder_kinds(child)]
    return [decoder["type"]]


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:  # an added token is stored as plain text
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
