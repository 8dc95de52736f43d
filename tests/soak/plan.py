"""What a soak sends: every request is fixed by the seed, and so is its text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dspark.v1 import generation_pb2 as wire

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for i in range(10):\n    print(i)\n" * 6,
    "# 漢字 🙂 naïve\nwith open(path) as file:\n    text = file.read()\n" * 3,
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6\n" * 12,
)
TEXTS = 60  # different requests whose texts are known


class Fate(Enum):
    """What the client does with its call."""

    READ = "read"
    CANCEL = "cancel"  # after some messages
    DEADLINE = "deadline"  # a short one
    MALFORMED = "malformed"
    STALL = "stall"  # reads nothing for long


@dataclass(frozen=True)
class Job:
    """One call."""

    number: int
    fate: Fate
    text: int  # which of the known texts; −1 for a malformed request
    request: wire.GenerateRequest
    after: int = 0  # CANCEL: messages to read first
    timeout_s: float | None = None


def known(index: int) -> wire.GenerateRequest:
    """Request number `index` of those whose texts are compared: greedy, or sampled with a seed and coupled."""
    rng = random.Random(f"text {index}")
    request = wire.GenerateRequest(text=rng.choice(PROMPTS), max_tokens=rng.choice([1, 8, 24, 24, 48, 64]))
    request.ignore_eos = rng.random() < 0.5
    if index % 3 == 0:
        request.sampling.temperature = 0.0
    else:
        request.sampling.temperature = rng.choice([0.5, 0.8, 1.0, 1.3])
        request.sampling.seed = rng.randrange(2**64)
        request.speculation.verification = wire.VERIFICATION_COUPLED
        if rng.random() < 0.3:
            request.sampling.top_p = 0.9
        if rng.random() < 0.2:
            request.sampling.repetition_penalty = 1.2
    if rng.random() < 0.3:
        request.stop.append("\n\n")
    if rng.random() < 0.2:
        request.logprobs = 3
    return request


def jobs(count: int, seed: int) -> Iterator[Job]:
    """20 % cancelled, 10 % with short deadlines, 5 % malformed, one in 500 stalled; the rest is read to the end."""
    rng = random.Random(f"soak {seed}")
    modes = (0, 0, 0, wire.SPECULATION_MODE_OFF, wire.SPECULATION_MODE_FIXED, wire.SPECULATION_MODE_THRESHOLD)
    for number in range(count):
        draw = rng.random()
        if draw < 0.05:
            yield Job(number, Fate.MALFORMED, -1, malformed(rng))
            continue
        index = rng.randrange(TEXTS)
        request = known(index)
        request.speculation.mode = rng.choice(modes)
        request.priority = rng.choice([0, 0, 0, 1, -1])
        if draw < 0.25:
            yield Job(number, Fate.CANCEL, index, request, after=rng.randrange(5))
        elif draw < 0.35:
            yield Job(number, Fate.DEADLINE, index, request, timeout_s=rng.choice([0.001, 0.02, 0.1, 0.5]))
        elif draw < 0.352:
            heavy = wire.GenerateRequest(text=PROMPTS[0], max_tokens=2000, ignore_eos=True, logprobs=20)
            yield Job(number, Fate.STALL, -1, heavy)
        else:
            yield Job(number, Fate.READ, index, request)


def malformed(rng: random.Random) -> wire.GenerateRequest:
    """One request with one mistake."""
    request = wire.GenerateRequest(text="x = ", max_tokens=4)
    mistakes: list[dict[str, Any]] = [
        {"text": ""},
        {"max_tokens": 0},
        {"min_tokens": 2**31},
        {"logprobs": 1000},
        {"stop": ["x"] * 99},
        {"stop": [""]},
        {"stop_token_ids": [2**32 - 1]},
        {"min_tokens_per_s": float("nan")},
        {"request_id": "two words"},
        {"sampling": wire.Sampling(temperature=-1)},
        {"sampling": wire.Sampling(top_p=float("inf"))},
        {"sampling": wire.Sampling(logit_bias={2**32 - 1: 1.0})},
        {"speculation": wire.Speculation(mode=99)},  # type: ignore[arg-type]
        {"token_ids": wire.TokenIds(ids=[2**32 - 1])},
        {"token_ids": wire.TokenIds(ids=[1] * 100_000)},
        {"chat": wire.Chat()},
        {"text": "x" * 1_000_000},
    ]
    request.MergeFrom(wire.GenerateRequest(**rng.choice(mistakes)))
    if request.text == "x = " and rng.random() < 0.1:
        request.ClearField("text")
    return request
