"""What requests ask, and how long they are."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.events import Chat, Message, Prompt


class WorkloadError(ValueError):
    """A mix, prompt file or trace that cannot be used; the message names the place."""


@dataclass(frozen=True, slots=True)
class LengthMix:
    """Lengths in tokens: ranges, ends included, each with a weight."""

    ranges: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]

    def draw(self, rng: random.Random) -> int:
        low, high = rng.choices(self.ranges, self.weights)[0]
        return rng.randint(low, high)


def parse_mix(text: str) -> LengthMix:
    """Reads LENGTH[-LENGTH][:WEIGHT],…, such as `64:5,256-512:3,1500:1`.

    Raises:
        WorkloadError: it does not read so.
    """
    ranges, weights = [], []
    for part in text.split(","):
        lengths, _, weight = part.partition(":")
        low, dash, high = lengths.partition("-")
        try:
            ranges.append((int(low), int(high if dash else low)))
            weights.append(float(weight or 1))
        except ValueError:
            raise WorkloadError(f"{part!r} is not LENGTH[-LENGTH][:WEIGHT], such as 64:5 or 256-512") from None
        if not 1 <= ranges[-1][0] <= ranges[-1][1] < 2**32:
            raise WorkloadError(f"{part!r}: lengths are at least 1, the smaller one first")
        if not 0 < weights[-1] < float("inf"):
            raise WorkloadError(f"{part!r}: a weight is a positive number")
    return LengthMix(tuple(ranges), tuple(weights))


@dataclass(frozen=True, slots=True)
class PromptMix:
    """Prompts with weights. `tokens` is all their text as ids, in a ring: the source of prompts of a given length."""

    prompts: tuple[Prompt, ...]
    weights: tuple[float, ...]
    tokens: tuple[int, ...] = ()

    def draw(self, rng: random.Random) -> Prompt:
        return rng.choices(self.prompts, self.weights)[0]

    def draw_tokens(self, rng: random.Random, length: int) -> Prompt:
        """`length` ids from a random place on."""
        start, size = rng.randrange(len(self.tokens)), len(self.tokens)
        return [self.tokens[(start + i) % size] for i in range(length)]


def read_prompts(path: Path) -> PromptMix:
    """A JSON object a line, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}, with a "weight" if wished.

    Raises:
        WorkloadError: the file cannot be read, or a line is something else.
    """
    prompts, weights = [], []
    for place, entry in json_lines(path):
        prompts.append(prompt_of(entry, place))
        weight = entry.get("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise WorkloadError(f"{place}: weight: must be a positive number, not {weight!r}")
        weights.append(float(weight))
    if not prompts:
        raise WorkloadError(f"{path}: no prompts in it")
    return PromptMix(tuple(prompts), tuple(weights))


def json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every object of a file with one a line, each with where it stands, for error messages."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{place}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise WorkloadError(f"{place}: must be a JSON object")
        found.append((place, entry))
    return found


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: {error}") from None


def prompt_of(entry: dict[str, Any], place: str) -> Prompt:
    """What an entry of a prompt file or trace asks."""
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if isinstance(prompt, str) and prompt and messages is None:
        return prompt
    if isinstance(messages, list) and messages and prompt is None:
        try:
            return Chat(tuple(Message(str(m["role"]), str(m["content"])) for m in messages))
        except (TypeError, KeyError):
            raise WorkloadError(f"{place}: messages: each needs a role and a content") from None
    raise WorkloadError(f"{place}: needs either prompt, a text, or messages")


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """Their plain text, chats without their template."""
    return [
        "\n".join(m.content for m in prompt.messages) if isinstance(prompt, Chat) else str(prompt) for prompt in prompts
    ]


_KINDS = (
    "def merge_sorted(left: list[int], right: list[int]) -> list[int]:\n",
    'class LruCache:\n    """A mapping that forgets what was not used for longest."""\n\n    def __init__(self, size):',
    "import json\nimport sys\n\n\ndef main() -> int:\n    with open(sys.argv[1]) as file:\n        rows =",
    "Question: A train leaves at 9:40 and arrives at 13:05. How many minutes does it travel?\nAnswer:",
    "17 + 25 = 42\n18 + 26 = 44\n19 + 27 = 46\n20 + 28 =",
    "The history of the lighthouse begins with fires on hilltops. Later, towers were built so that",
    "Dear Ms Alvarez,\n\nthank you for your letter of 3 May about the delayed delivery. We have looked into it and",
    "Explain to a student, step by step and with an example, why binary search needs a sorted list.\n\n",
)
BUILT_IN = PromptMix(_KINDS, (1.0,) * len(_KINDS))
