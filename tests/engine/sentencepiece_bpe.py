"""SentencePiece's own algorithm, written plainly: the oracle of converted tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

SPACE = "\u2581"
_NORMAL, _USER_DEFINED = 1, 4


def pieces(text: str, vocabulary: Sequence[tuple[str, int, float]]) -> list[int]:
    """The ids of a text without special tokens: of all neighbours, those that make the best token join, leftmost first.

    Args:
        vocabulary: tokens, kinds as GGUF numbers them, scores.
    """
    text = text.replace(" ", SPACE)
    ids = {
        token.replace(" ", SPACE) if kind == _USER_DEFINED else token: i
        for i, (token, kind, _) in enumerate(vocabulary)
    }
    scores = {token: score for token, kind, score in vocabulary if kind == _NORMAL}
    whole = {token.replace(" ", SPACE) for token, kind, _ in vocabulary if kind == _USER_DEFINED}
    longest = max(map(len, whole), default=0)
    parts: list[tuple[str, bool]] = []  # with whether it may join
    place = 0
    while place < len(text):
        found = next((n for n in range(longest, 0, -1) if text[place : place + n] in whole), 0)
        parts.append((text[place : place + (found or 1)], not found))
        place += found or 1
    while True:
        pairs = [
            (-scores[left + right], index)
            for index, ((left, joins), (right, too)) in enumerate(pairwise(parts))
            if joins and too and left + right in scores
        ]
        if not pairs:
            break
        _, index = min(pairs)
        parts[index : index + 2] = [(parts[index][0] + parts[index + 1][0], True)]
    result = []
    for part, _ in parts:
        result += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return result
