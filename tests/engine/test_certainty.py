"""How certain the target is of a request: read off the rounds, and each request's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.schedule import native_books as b
from engine.types import Phase, Sampling
from tests.engine.helpers import GREEDY, load, request


def test_certainty_is_the_probability_of_the_likeliest_token(hf_target: Qwen3ForCausalLM, target_dir: Path) -> None:
    engine = load(target_dir)
    temperatures = {"a": 1.0, "b": 0.5, "late": 0.8}
    for name in ("a", "b"):
        engine.submit(request(name, (3, 5, ord(name) - 90), 60, Sampling(temperature=temperatures[name])))
    engine.submit(request("greedy", (9, 9), 60, GREEDY))
    for _ in range(12):
        engine.step()
    engine.submit(request("late", tuple(range(40)), 60, Sampling(temperature=temperatures["late"])))
    for _ in range(9):
        engine.step()
    for sequence in engine.running:
        assert sequence.phase is Phase.DECODE
        own = engine.scheduler.planner.books.real[sequence.slot]
        name = sequence.request.request_id
        if name == "greedy":
            assert own[b.CERTAIN] == 0, "its rounds work out no probabilities"
            continue
        with torch.no_grad():
            logits = hf_target(torch.tensor([sequence.tokens])).logits[0]
        likeliest = torch.softmax(logits / temperatures[name], -1).amax(-1)
        average = 0.0
        rounds = sequence.output_length - 1  # its first token is the prompt's
        for n in range(rounds):
            average += max(0.1, 1 / (n + 1)) * (float(likeliest[sequence.prompt_length + n]) - average)
        assert own[b.CERTAIN] == rounds
        assert own[b.CERTAINTY] == pytest.approx(average, rel=1e-3)
