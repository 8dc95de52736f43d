"""Regenerated answers: the target's own, complete after a kill, bad lines named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.training.export import read_target
from engine.training.regenerate import Job, regenerate
from engine.training.settings import SettingsError
from engine.training.sources import open_source


def job(target: Path, prompts: Path | None, **changes: object) -> Job:
    given: dict[str, object] = {
        "target": str(target),
        "draft": "none",
        "prompts": prompts,
        "corpus": None,
        "count": 5,
        "prompt_tokens": 8,
        "tokens": 10,
        "samples": 1,
        "temperatures": (0.0,),
        "ignore_end": True,
        "seed": 3,
    }
    return Job(**{**given, **changes})  # type: ignore[arg-type]


def answers(folder: Path) -> dict[str, list[int]]:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len({row["name"] for row in rows}) == len(rows), "an answer stands twice"
    return {row["name"]: row["answer_tokens"] for row in rows}


def test_answers_are_the_targets_own(words: Path, questions: Path, tmp_path: Path) -> None:
    """Greedy answers against the training model's argmax, one token after another."""
    regenerate(job(words, questions), tmp_path, 1, 4)
    model = read_target(words)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["domain"] for row in rows} == {"code", "prose"}
    for row in rows[:4]:
        tokens = list(row["prompt_tokens"])
        for token in row["answer_tokens"]:
            hidden, _ = model.model(torch.tensor([tokens]))
            assert int(model.logits(hidden[0, -1]).argmax()) == token
            tokens.append(token)


def test_a_killed_job_ends_with_the_same_answers(words: Path, questions: Path, tmp_path: Path) -> None:
    wanted = job(words, questions, temperatures=(1.0, 0.5), samples=2)
    regenerate(wanted, tmp_path / "whole", 1, 4)
    lines = (tmp_path / "whole" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    regenerate(replace(wanted), tmp_path / "cut", 1, 4)
    # As a kill leaves it: some answers missing, the last line half written.
    (tmp_path / "cut" / "answers.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])
    regenerate(wanted, tmp_path / "cut", 1, 3)
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_a_drafter_changes_no_answer(words: Path, questions: Path, tiny_drafter: Path, tmp_path: Path) -> None:
    wanted = job(words, questions, temperatures=(1.0,))
    regenerate(wanted, tmp_path / "plain", 1, 4)
    regenerate(replace(wanted, draft=str(tiny_drafter)), tmp_path / "drafted", 1, 4)
    assert answers(tmp_path / "plain") == answers(tmp_path / "drafted")


def test_bad_lines_are_named_skipped_and_counted(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"prompt": "w5 w6"}\n{"prompt": 7}\nnot json\n\n'
        '{"tokens": [1, 2, 3]}\n{"tokens": [1, 999]}\n{"prompt": ""}\n[1]\n'
    )
    regenerate(job(words, path), tmp_path / "out", 1, 4)
    said = capsys.readouterr().err
    for number in (2, 3, 6, 7, 8):
        assert f"{path}, line {number}: skipped: " in said
    assert f"{path}: 5 of 7 lines skipped" in said
    assert set(answers(tmp_path / "out")) == {"1/0", "5/0"}


def test_another_job_does_not_continue_a_folder(words: Path, questions: Path, tmp_path: Path) -> None:
    regenerate(job(words, questions), tmp_path, 1, 4)
    with pytest.raises(SettingsError, match=r"was begun with another seed \(3\)"):
        regenerate(job(words, questions, seed=4), tmp_path, 1, 4)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(lines[0] + b"{broken}\n" + lines[1])
    with pytest.raises(SettingsError, match=r"answers\.jsonl, line 2: damaged"):
        regenerate(job(words, questions), tmp_path, 1, 4)


def test_training_asks_for_answers_only(words: Path, token_file: Path, tmp_path: Path) -> None:
    """Prompts cut from a corpus are context; `train` reads the folder as a source."""
    regenerate(job(words, None, corpus=token_file, count=30, tokens=12), tmp_path, 1, 8)
    stream = open_source(tmp_path, 96)
    assert stream.asked is not None and len(stream.tokens) == 30 * (8 + 12)
    assert stream.asked.reshape(30, 20).tolist() == [[False] * 8 + [True] * 12] * 30
