"""Byte-level BPE tokenizer in the transformers file format, and encoding of the corpus.

python -m engine.training.tokenizer --corpus DIR --out TARGET_DIR            (trains, then encodes DIR)
python -m engine.training.tokenizer --corpus DIR --out TARGET_DIR --encode   (encodes with the tokenizer that is there)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 4096
END, START_TURN, END_TURN, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL = (END, START_TURN, END_TURN, MASK)
CHAT_TEMPLATE = """\
{%- if system_prompt is defined and system_prompt \
and (not messages or messages[0].role != 'system') -%}
{{- '<|im_start|>system\\n' + system_prompt + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def read(path: Path) -> Iterator[tuple[str, str]]:
    """(domain, text) of a corpus file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["domain"], row["text"]


def train(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB entries, specials first, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with the chat template)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [START_TURN, END_TURN, MASK],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, rows: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """{domain or "all": uint16 token stream}, every document followed by <|endoftext|>."""
    end = tokenizer.token_to_id(END)
    streams: dict[str, list[np.ndarray]] = {"all": []}
    for at in range(0, len(rows), 1000):
        chunk = rows[at : at + 1000]
        for (domain, _), item in zip(chunk, tokenizer.encode_batch([text for _, text in chunk]), strict=True):
            ids = np.array([*item.ids, end], dtype=np.uint16)
            streams["all"].append(ids)
            streams.setdefault(domain, []).append(ids)
    return {name: np.concatenate(parts) for name, parts in streams.items()}


def main() -> None:
    """Train on a third of the corpus and save, unless told otherwise; encode both splits to DIR/{train,heldout}.npz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encode", action="store_true", help="train none: a target that is there needs its own")
    args = parser.parse_args()
    rows = list(read(args.corpus / "train.jsonl"))
    if args.encode:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tokenizer = train(text for _, text in rows[::3])
        save(tokenizer, args.out)
    for split in ("train", "heldout"):
        if split == "heldout":
            rows = list(read(args.corpus / "heldout.jsonl"))
        streams = encode(tokenizer, rows)
        kept = streams if split == "heldout" else {"all": streams["all"]}
        np.savez(args.corpus / f"{split}.npz", allow_pickle=False, **kept)
        print(split, {name: len(ids) for name, ids in streams.items()})


if __name__ == "__main__":
    main()
