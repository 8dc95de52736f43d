"""Answers of the target itself, decoded in batches by the engine; resumable after a kill."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.models.hub import resolve
from engine.schedule.calibrate import weights_hash
from engine.training.decoding import resolve_drafter
from engine.training.progress import Progress
from engine.training.settings import SettingsError
from engine.training.sources import open_source
from engine.types import EndConditions, FinishReason, Request, Sampling


@dataclass(frozen=True)
class Job:
    """What to answer, and how; two runs into one folder must agree on all of it but the drafter."""

    target: str
    draft: str
    prompts: Path | None
    corpus: Path | None
    count: int
    prompt_tokens: int
    tokens: int
    samples: int
    temperatures: tuple[float, ...]
    ignore_end: bool
    seed: int

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.corpus is None):
            raise SettingsError("give either --prompts or --corpus: where the prompts come from")


@dataclass(frozen=True)
class Question:
    """One answer to be made; `name` is its line in the source and its sample."""

    name: str
    tokens: tuple[int, ...]
    domain: str
    temperature: float
    seed: int


def questions(job: Job, tokenizer: Tokenizer | None, vocabulary: int, room: int) -> list[Question]:
    """Every answer that the job asks for; unusable prompt lines are reported, skipped and counted.

    Args:
        room: the longest prompt in tokens.

    Raises:
        SettingsError: the source cannot be read or holds no usable prompt.
    """
    if job.corpus is not None:
        stream = open_source(job.corpus, vocabulary)
        if len(stream.tokens) <= job.prompt_tokens or job.prompt_tokens > room:
            raise SettingsError(f"--prompt-tokens {job.prompt_tokens} is too long for {job.corpus} or for the context")
        starts = np.random.default_rng(job.seed).integers(0, len(stream.tokens) - job.prompt_tokens, job.count)
        rows = [
            (f"{i}", "all", tuple(int(t) for t in stream.tokens[at : at + job.prompt_tokens]))
            for i, at in enumerate(starts)
        ]
    else:
        assert job.prompts is not None
        rows = _lines(job.prompts, tokenizer, vocabulary, room)
    found: list[Question] = []
    for name, domain, tokens in rows:
        for sample in range(job.samples):
            number = len(found)
            temperature = job.temperatures[number % len(job.temperatures)]
            found.append(Question(f"{name}/{sample}", tokens, domain, temperature, job.seed * 1_000_003 + number))
    return found


def _lines(
    path: Path, tokenizer: Tokenizer | None, vocabulary: int, room: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from None
    rows, bad = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((str(number), *_prompt(json.loads(line), tokenizer, vocabulary, room)))
        except (ValueError, TypeError) as error:
            bad += 1
            print(f"{path}, line {number}: skipped: {error}", file=sys.stderr)
    if bad:
        print(f"{path}: {bad} of {bad + len(rows)} lines skipped", file=sys.stderr)
    if not rows:
        raise SettingsError(f'{path} holds no usable prompt; write {{"prompt": "…"}} a line')
    return rows


def _prompt(row: Any, tokenizer: Tokenizer | None, vocabulary: int, room: int) -> tuple[str, tuple[int, ...]]:
    """(domain, tokens) of one line.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    tokens, domain = row.get("tokens"), row.get("domain", "all")
    if tokens is None:
        if not isinstance(row.get("prompt"), str):
            raise ValueError("has neither `prompt` (text) nor `tokens` (ids)")
        if tokenizer is None:
            raise ValueError("is text, but the target has no tokenizer.json; give `tokens`")
        tokens = tokenizer.encode(row["prompt"]).ids
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("the prompt is empty")
    if not all(isinstance(t, int) and 0 <= t < vocabulary for t in tokens):
        raise ValueError(f"a token is not a whole number between 0 and {vocabulary - 1}")
    if len(tokens) > room:
        raise ValueError(f"has {len(tokens)} tokens; {room} leave room for the answer")
    return str(domain), tuple(tokens)


def recover(path: Path) -> set[str]:
    """Names of the answers in the file; a last line that a kill cut off is removed.

    Raises:
        SettingsError: a damaged line anywhere else.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    names = set()
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            names.add(row["name"])
            _ = row["prompt_tokens"], row["answer_tokens"]
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{path}, line {number}: damaged; delete the line and run again") from None
    return names


def _claim(job: Job, target: Path, out: Path) -> None:
    """Make the folder, or see that it belongs to the same job.

    Raises:
        SettingsError: another job's folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    mine = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items() if k not in ("draft", "target")}
    mine = json.loads(json.dumps({**mine, "weights": weights_hash(target)}))
    path = out / "job.json"
    if not path.exists():
        path.with_suffix(".tmp").write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); give another --out") from None
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            raise SettingsError(f"{out} was begun with another {name} ({theirs.get(name)}); give it, or another --out")


def regenerate(job: Job, out: Path, threads: int, running: int) -> Path:
    """Answer every question that OUT/answers.jsonl lacks; returns that file.

    Raises:
        SettingsError, LoadError: what is wrong, where, and the mend.
    """
    target = resolve(job.target, None)
    _claim(job, target, out)
    draft = "none" if job.draft == "none" else resolve_drafter(job.draft)
    engine = load_engine(
        EngineConfig(str(target), draft, threads=threads, kv_memory=2**29, max_running=running, max_queue=2 * running)
    )
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json")) if (target / "tokenizer.json").exists() else None
    room = engine.info.max_model_len - job.tokens
    if room < 1:
        raise SettingsError(f"--tokens {job.tokens} fills the context of {engine.info.max_model_len}; ask for fewer")
    path = out / "answers.jsonl"
    done = recover(path)
    asked = questions(job, tokenizer, engine.info.vocab_size, room)
    left = deque(q for q in asked if q.name not in done)
    if done:
        print(f"{path}: {len(asked) - len(left)} of {len(asked)} answers are there already", file=sys.stderr)
    with (
        path.open("a", encoding="utf-8") as file,
        Progress("data", len(asked), "answers", len(asked) - len(left)) as bar,
    ):
        _answer(engine, job, left, file, bar)
    return path


def _answer(engine: Engine, job: Job, left: deque[Question], file: TextIO, bar: Progress) -> None:
    end = EndConditions(job.tokens, 0, frozenset() if job.ignore_end else frozenset(engine.info.eos_ids))
    open_: dict[str, tuple[Question, list[int]]] = {}
    done = tokens = 0
    while left or engine.has_work:
        while left and len(engine.waiting) < engine.config.max_running:
            question = left.popleft()
            open_[question.name] = question, []
            sampling = Sampling(question.temperature, seed=question.seed)
            engine.submit(Request(question.name, question.tokens, end, sampling))
        for delta in engine.step():
            question, answer = open_[delta.request_id]
            answer += delta.tokens
            tokens += len(delta.tokens)
            if delta.finish is None:
                continue
            del open_[delta.request_id]
            done += 1
            if delta.finish is FinishReason.ERROR:
                print(f"prompt {question.name}: skipped: {delta.error}", file=sys.stderr)
                continue
            row = {"name": question.name, "domain": question.domain, "temperature": question.temperature}
            row |= {"prompt_tokens": question.tokens, "answer_tokens": answer, "finish": delta.finish.value}
            file.write(json.dumps(row) + "\n")
            file.flush()
        bar.update(bar.begun + done, f"{tokens:,} tokens")
