"""Prompts for a foreign target: apart by text, short enough, from a corpus, made and from conversations."""

from __future__ import annotations

import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.training import gather
from engine.training.plan import load_plan
from engine.training.settings import SettingsError

RECIPES = Path("engine/training/recipes/gemma3_270m")
WORDS = ("alpha", "beta", "gamma", "delta", "words", "here", "that", "make", "up", "sentences", "about", "nothing")


def module(name: str) -> str:
    """Source with a function that is long enough to be cut."""
    body = "\n".join(f"    {name}_{i} = compute({name!r}, {i}) + other_{name}" for i in range(12))
    return f"import {name}\n\n\ndef make_{name}(first, second):\n{body}\n    return {name}_1\n"


def essay(seed: int) -> str:
    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=60)) for _ in range(6))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for half, count, first in (("train", 24, 0), ("heldout", 12, 100)):
        rows = [{"domain": "code", "text": module(f"m{first + i}")} for i in range(count)]
        rows += [{"domain": "prose", "text": essay(first + i)} for i in range(count)]
        (folder / f"{half}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """Conversations in a file that ends in the middle of one."""
    rows = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"Please tell me more about number {i}."}]}
        for i in range(120)
    ]
    rows += [{"id": "x", "conversations": []}, {"id": "y", "conversations": [{"from": "gpt", "value": "an answer"}]}]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(rows, indent=2)[:-60])
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A tokenizer of words and marks."""
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_three_files_apart(
    corpus: Path,
    chat: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    given = ["--target", target, "--corpus", corpus, "--chat", chat, "--out", out, "--count", 60, "--apart", 3]
    monkeypatch.setattr(sys, "argv", ["gather", *map(str, given)])
    assert gather.main() == 0
    said = capsys.readouterr()
    assert "ends in the middle of entry 122; 121 are whole" in said.err
    rows = {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in gather.SPLITS
    }
    prompts = [row["prompt"] for found in rows.values() for row in found]
    assert len(prompts) == len(set(prompts))
    assert {row["domain"] for row in rows["train"]} == {"code", "prose", "arithmetic", "chat"}
    held = {row["prompt"].split("make_m")[1].split("(")[0] for row in rows["heldout"] if row["domain"] == "code"}
    assert held and all(int(number) >= 100 for number in held)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert max(len(tokenizer.encode(prompt).ids) for prompt in prompts) <= 96
    assert not any("<|im_start|>" in prompt for prompt in prompts)
    for row in rows["train"]:
        if row["domain"] == "chat":
            assert row["prompt"].startswith("User: Please tell") and row["prompt"].endswith("\n\nAssistant:")


def test_a_text_stays_in_its_split() -> None:
    splits = [gather.split_of(str(i)) for i in range(2000)]
    assert splits == [gather.split_of(str(i)) for i in range(2000)]
    assert splits.count("train") == pytest.approx(1800, abs=80) and set(splits) == set(gather.SPLITS)


def test_the_standard_library_has_prose() -> None:
    names = dict(islice(gather.documentation(), 20))
    assert "assignment" in names and len(names["assignment"]) > 1000


def test_a_file_that_holds_no_conversations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    for text, message in (("[]", "holds no conversation"), ('[{"text": "a"}]', "entry 1 has no")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=message):
            list(gather.conversations(path))
    with pytest.raises(SettingsError, match="cannot be read"):
        list(gather.conversations(tmp_path / "missing.json"))


@pytest.mark.parametrize("name", ["dspark", "dflash", "eagle3", "mtp"])
def test_the_recipes_hold(name: str) -> None:
    plan = load_plan(RECIPES / f"{name}.toml", ["target=somewhere"])
    assert plan.drafter == name and plan.model.draft_vocab == 16384
    common = load_plan(RECIPES / "dspark.toml", ["target=somewhere"])
    assert plan.run == common.run and plan.optim == common.optim
    if name in ("dflash", "eagle3"):  # one cache serves them
        assert plan.model.feature_layers == common.model.feature_layers and plan.data == common.data
