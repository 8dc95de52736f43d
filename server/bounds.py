"""How large what clients send may be."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 2**20
METADATA_BYTES = 16 * 2**10
MAX_MESSAGES = 4096  # of a conversation
SENT_BYTES = 16 * MEBIBYTE  # our own answers; a round with many log-probabilities is large


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one request. The context length bounds a prompt as well."""

    message_bytes: int = 4 * MEBIBYTE
    prompt_bytes: int = 2 * MEBIBYTE
    prompt_tokens: int | None = None
