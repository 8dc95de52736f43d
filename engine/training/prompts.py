"""Held-out prompts for evaluation, none of them near any training text.

python -m engine.training.prompts --corpus DIR --out FILE [--seed N --apart-from FILE --times N]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from engine.training import arithmetic
from engine.training.clean import Seen, shingles
from engine.training.tokenizer import read

COUNTS = {"code": 64, "prose": 32, "arithmetic": 32}
TURN = "<|im_start|>assistant\n"


def code_prompt(text: str, rng: random.Random, longest: int = 750) -> str | None:
    """200 to 800 characters of source, about `longest` at most, that end a few lines into a function body."""
    lines = text.split("\n")
    heads = [i for i, line in enumerate(lines) if re.match(r"\s*def \w+\(.*\).*:$", line)]
    if not heads:
        return None
    at = rng.choice(heads)
    end = at + rng.randint(3, 8)
    indent = len(lines[at]) - len(lines[at].lstrip())
    body = lines[at + 1 : end + 4]
    if len(body) < 6 or any(s.strip() and len(s) - len(s.lstrip()) <= indent for s in body):
        return None
    if end > len(lines) or not lines[end - 1].strip():
        return None
    begin = at
    while begin > 0 and len("\n".join(lines[begin - 1 : end])) <= longest:
        begin -= 1
    prompt = "\n".join(lines[begin:end]).strip("\n").rstrip()
    return prompt if 200 <= len(prompt) <= 800 and prompt.count('"""') % 2 == 0 else None


def prose_prompt(text: str, rng: random.Random, longest: int = 600) -> str | None:
    """200 to `longest` characters that start with a paragraph and end between words."""
    paragraphs = text.split("\n\n")
    start = rng.randrange(len(paragraphs))
    passage = "\n\n".join(paragraphs[start:]).strip()
    size = rng.randint(200, max(200, longest))
    cut = passage.rfind(" ", 0, size)
    letters = sum(c.isalpha() or c.isspace() for c in passage[:size])
    if cut < 200 or len(passage) < size + 300 or letters < 0.85 * size:
        return None
    return passage[:cut]


def arithmetic_prompt(text: str, rng: random.Random) -> str | None:
    """Worked examples and a question whose answer is still to come."""
    if TURN in text:
        cuts = [m.end() for m in re.finditer(re.escape(TURN), text)]
    elif "Answer:" in text:
        cuts = [m.end() for m in re.finditer("Answer:", text)]
    else:
        cuts = [m.end() for m in re.finditer(" =(?= )", text)]
    cuts = [cut for cut in cuts if 40 <= cut <= 800]
    return text[: rng.choice(cuts)] if cuts else None


def choose(corpus: Path, seed: int = 12, apart_from: tuple[str, ...] = (), times: int = 1) -> list[dict[str, str]]:
    """`times` COUNTS prompts, fewer where the held-out texts have no more; none shares four lines with `apart_from`."""
    rng = random.Random(seed)
    pools: dict[str, list[str]] = {"code": [], "prose": []}
    for domain, text in read(corpus / "heldout.jsonl"):
        if domain in pools:
            pools[domain].append(text)
    pools["arithmetic"] = arithmetic.documents(60_000, seed=9)
    makers = {"code": code_prompt, "prose": prose_prompt, "arithmetic": arithmetic_prompt}
    known: set[int] = set()
    for domain, text in read(corpus / "train.jsonl"):
        if domain != "arithmetic":
            known |= shingles(text, 3)
    out: list[dict[str, str]] = []
    for domain, count in COUNTS.items():
        count *= times
        taken, seen, tries = 0, Seen(), 0
        for text in apart_from:
            seen.add(text)
        while taken < count and tries < 20_000 * times:
            tries += 1
            prompt = makers[domain](rng.choice(pools[domain]), rng)
            if prompt is None or seen.overlap(prompt) > 0:
                continue
            if domain != "arithmetic" and shingles(prompt, 3) & known:
                continue
            seen.add(prompt)
            out.append({"prompt": prompt, "domain": domain})
            taken += 1
    return out


def main() -> None:
    """Write the prompts as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--apart-from", type=Path, help="prompts that these must not repeat: to calibrate, say")
    parser.add_argument("--times", type=int, default=1, help=f"how often {COUNTS}: many, to calibrate")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    others = args.apart_from.read_text(encoding="utf-8").splitlines() if args.apart_from else []
    rows = choose(args.corpus, args.seed, tuple(json.loads(line)["prompt"] for line in others), args.times)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print({domain: sum(r["domain"] == domain for r in rows) for domain in COUNTS})


if __name__ == "__main__":
    main()
