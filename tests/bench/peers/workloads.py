"""What every peer decodes: a checkpoint, prompts of one length, how many tokens, how many requests at once."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from engine.errors import LoadError
from engine.models.gguf.convert import STAMP
from engine.models.real import PACKAGE, real_weights
from tests.bench.measure import DEMO, EMBEDDED

RANDOM = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Equal work for all arms.

    Args:
        directory: the checkpoint, in the Hugging Face layout.
        dtype: of the weights and products, for all that read the checkpoint.
        prompts: token ids, all of one length; the first n are n requests.
        tokens: new ones, greedy, whatever ends a text.
        counts: requests at once.
        draft: our drafter, or none.
        assistant: a smaller model of the same vocabulary, or none.
        package: what carries the same weights as a GGUF file, or none.
    """

    name: str
    about: str
    directory: Path
    dtype: str
    prompts: list[list[int]]
    tokens: int
    counts: tuple[int, ...]
    draft: Path | None = None
    assistant: Path | None = None
    package: str | None = None

    @property
    def length(self) -> int:
        """Tokens of one request, prompt and answer."""
        return len(self.prompts[0]) + self.tokens


def random_qwen3(folder: Path) -> Workload:
    """A random Qwen3 in float32, 32-token prompts, 128 new tokens; the checkpoint is written once."""
    directory = folder / "random-qwen3"
    write_random(directory)
    chosen = random.Random(0)
    prompts = [[chosen.randrange(RANDOM["vocab_size"]) for _ in range(32)] for _ in range(16)]  # type: ignore[call-overload]
    about = "random Qwen3, hidden 256, 6 layers, vocabulary 8,192; 32-token prompts, 128 new tokens"
    return Workload("random", about, directory, "float32", prompts, 128, (1, 4, 8, 16))


def write_random(directory: Path) -> None:
    """Weights as transformers would draw them (normal, 0.02; norms 1), the same ones every time."""
    if (directory / "config.json").is_file():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    c = {key: value for key, value in RANDOM.items() if isinstance(value, int)}
    hidden, vocab, wide = c["hidden_size"], c["vocab_size"], c["intermediate_size"]
    q, kv = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    noise = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return 0.02 * torch.randn(rows, columns, generator=noise)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for part, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            tensors[f"{at}.self_attn.{part}_proj.weight"] = matrix(rows, columns)
        for part, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            tensors[f"{at}.mlp.{part}_proj.weight"] = matrix(rows, columns)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{norm}.weight"] = torch.ones(c["head_dim"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(hidden)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    tokenizer = Tokenizer(WordLevel({f"t{token}": token for token in range(vocab)}, unk_token="t0"))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(RANDOM, indent=2) + "\n", encoding="utf-8")  # last: all is there


def embedded(dtype: str) -> Workload:
    """The embedded model and its drafter on held-out code."""
    directory = DEMO / "target"
    prompts = _tokenised(directory, EMBEDDED.heldout("code"), 64, 16)
    about = "the embedded model, held-out code; 64-token prompts, 128 new tokens"
    return Workload(f"embedded-{dtype}", about, directory, dtype, prompts, 128, (1, 4, 16), draft=DEMO / "dspark")


def gemma(dtype: str, directory: Path | None, draft: Path | None) -> Workload:
    """Gemma 3 270M, converted, on held-out code and prose.

    Args:
        directory: a conversion made before; None takes (or makes) the one of `make real`.

    Raises:
        LoadError: no weights.
    """
    directory = directory or real_weights()
    if not (directory / STAMP).is_file():
        raise LoadError(f"{directory} is no converted checkpoint: {STAMP} is missing; `make real` makes one")
    texts = [text for pair in zip(EMBEDDED.heldout("code"), EMBEDDED.heldout("prose"), strict=False) for text in pair]
    prompts = _tokenised(directory, texts, 64, 16)
    about = "Gemma 3 270M (Q4_K_M, dequantised), held-out code and prose; 64-token prompts, 64 new tokens"
    return Workload(f"gemma-{dtype}", about, directory, dtype, prompts, 64, (1, 4, 16), draft=draft, package=PACKAGE)


def _tokenised(directory: Path, texts: list[str], length: int, count: int) -> list[list[int]]:
    """The last `length` tokens of the first texts that have as many, what opens a text (BOS) kept in front."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompts = []
    for text in texts:
        ids: list[int] = tokenizer.encode(text).ids
        opening = len(ids) - len(tokenizer.encode(text, add_special_tokens=False).ids)
        if len(ids) >= length:
            prompts.append([*ids[:opening], *ids[len(ids) - length + opening :]])
    assert len(prompts) >= count, f"{len(prompts)} held-out prompts of {length} tokens, {count} are needed"
    return prompts[:count]
