"""Build the corpus: Python source, English documentation and synthetic arithmetic.

python -m engine.training.corpus --out DIR [--wheels DIR] [--docs DIR] [--fetch]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from engine.training import arithmetic
from engine.training.clean import Seen, good_code, good_prose, normalise, strip_header

# Whole packages kept out of training.
HELD_OUT = frozenset(
    (
        *("tornado", "httpx", "toolz", "cattrs", "bottle", "mistune", "cherrypy", "apscheduler"),
        *("simpy", "tinydb", "hypercorn", "voluptuous", "pyrsistent", "radon"),
    )
)
SKIP = re.compile(
    r"(^|/)(tests?|testing|_vendor|vendor|vendored|_vendored|extern|externals|locale|lib2to3"
    r"|idlelib|encodings|migrations|_emoji_codes|unicode|lexers|site-packages|dist-packages)(/|$)"
)
PER_PACKAGE = 3_000_000
SOURCES = Path(__file__).with_name("sources.txt")
DEBIAN = (
    *("python3.11-doc", "python-sqlalchemy-doc", "python-flask-doc", "python-jinja2-doc"),
    *("python-pandas-doc", "python-sympy-doc", "python-werkzeug-doc", "python-attr-doc"),
)


def fetch(wheels: Path, docs: Path) -> None:
    """Download the pinned wheels (pip) and the documentation packages (apt-get, optional)."""
    wheels.mkdir(parents=True, exist_ok=True)
    docs.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "-d", str(wheels), "-r", str(SOURCES)], check=True)
    subprocess.run(["apt-get", "download", *DEBIAN], cwd=docs, check=True)
    for package in sorted(docs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(docs / package.stem)], check=True)


def stdlib() -> Iterator[tuple[str, str, str]]:
    """(package, path, text) of the running Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not SKIP.search(name):
            yield "stdlib", name, path.read_text(encoding="utf-8", errors="ignore")


def wheel(path: Path) -> Iterator[tuple[str, str, str]]:
    """(package, path, text) of the text files in one wheel."""
    package = path.name.split("-")[0].lower()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            wanted = name.endswith((".py", ".rst", ".md", "/METADATA"))
            if wanted and not SKIP.search(name):
                yield package, name, archive.read(name).decode("utf-8", errors="ignore")


def manuals(root: Path) -> Iterator[tuple[str, str, str]]:
    """(package, path, text) of reStructuredText sources in unpacked documentation packages."""
    for path in sorted(root.rglob("*.rst*")):
        if path.is_file() and path.suffix in (".rst", ".txt"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield "docs", path.relative_to(root).as_posix(), text


def metadata_body(text: str) -> str:
    """The long description of a METADATA file (after its headers)."""
    return text.split("\n\n", 1)[1] if "\n\n" in text else ""


def collect(wheels: Path, docs: Path) -> dict[str, dict[str, list[str]]]:
    """{split: {domain: texts}} after filters, caps and near-duplicate removal."""
    rng = random.Random(1)
    files = list(stdlib())
    for path in sorted(wheels.glob("*.whl")):
        files.extend(wheel(path))
    files.extend(manuals(docs))
    rng.shuffle(files)
    files.sort(key=lambda item: item[0] in HELD_OUT)
    seen, used = Seen(), Counter[str]()
    out: dict[str, dict[str, list[str]]] = {split: {"code": [], "prose": []} for split in ("train", "heldout")}
    for package, name, raw in files:
        code = name.endswith(".py")
        if name.endswith("/METADATA"):
            raw = metadata_body(raw)
        text = normalise(strip_header(raw) if code else raw)
        held = package in HELD_OUT or (not code and package == "docs" and rng.random() < 0.04)
        if used[package] + len(text) > (PER_PACKAGE if package not in ("stdlib", "docs") else 4e7):
            continue
        if not (good_code(text) if code else good_prose(text)):
            continue
        if seen.overlap(text) > (0.2 if held else 0.4):
            continue
        seen.add(text)
        used[package] += len(text)
        split, domain = "heldout" if held else "train", "code" if code else "prose"
        out[split][domain].append(text if code else text[:60_000])
    for package, size in used.most_common(12):
        print(f"  {package}: {size / 1e6:.1f} M characters", file=sys.stderr)
    return out


def cut(texts: list[str], characters: int) -> list[str]:
    """A seeded random choice of texts of about this many characters."""
    order = random.Random(3).sample(texts, len(texts))
    out: list[str] = []
    for text in order:
        if characters <= 0:
            break
        out.append(text)
        characters -= len(text)
    return out


def main() -> None:
    """Write DIR/{train,heldout}.jsonl, one {"domain", "text"} object a line, shuffled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, default=Path("build/wheels"))
    parser.add_argument("--docs", type=Path, default=Path("build/docs"))
    parser.add_argument("--fetch", action="store_true", help="download the sources first")
    parser.add_argument("--code", type=int, default=55_000_000, help="characters of code")
    parser.add_argument("--arithmetic", type=int, default=6_500_000, help="characters")
    args = parser.parse_args()
    if args.fetch:
        fetch(args.wheels, args.docs)
    splits = collect(args.wheels, args.docs)
    splits["train"]["code"] = cut(splits["train"]["code"], args.code)
    splits["train"]["arithmetic"] = arithmetic.documents(args.arithmetic, seed=7)
    splits["heldout"]["arithmetic"] = arithmetic.documents(200_000, seed=8)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, domains in splits.items():
        rows = [{"domain": d, "text": t} for d, texts in domains.items() for t in texts]
        random.Random(2).shuffle(rows)
        sizes = {d: round(sum(map(len, texts)) / 1e6, 2) for d, texts in domains.items()}
        print(f"{split}: {len(rows)} documents, millions of characters {sizes}", file=sys.stderr)
        with (args.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
