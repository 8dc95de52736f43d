"""Training text as token streams: packed corpora, the target's own text, and regenerated answers.

Everything is a function of (seed, step): a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.models.loader import read_json
from engine.training.settings import SettingsError

UNIT = 256  # windows start at multiples of this


@dataclass(frozen=True)
class Stream:
    """Tokens one after another, and which of them a drafter may be asked for."""

    name: str
    tokens: np.ndarray  # [N] integers
    asked: np.ndarray | None  # [N] bool; None: all but a document's first token
    # The token that a text of this target begins with, if any. Without it such a target says nothing of worth, so that
    # every row begins with it: where a document begins, or else in place of the row's first token.
    begin: int | None = None
    starts: np.ndarray | None = None  # where documents begin, in units of 256 tokens, where rows begin with documents

    def __post_init__(self) -> None:
        if len(self.tokens) <= UNIT:
            raise SettingsError(f"{self.name} holds {len(self.tokens)} tokens; a source needs more than {UNIT}")

    @property
    def windows(self) -> int:
        if self.starts is not None:  # the last one may be cut short: it is padded
            return -(-len(self.tokens) // UNIT)
        return (len(self.tokens) - 1) // UNIT

    def start(self, index: int, length: int, seed: int) -> int:
        """Where the window of `length` tokens begins that is number `index` in units of 256 tokens."""
        if self.starts is not None:
            count = len(self.starts)
            epoch, rest = divmod(index // max(1, length // UNIT), count)
            return int(self.starts[_order(seed, epoch, count)[rest]]) * UNIT
        epoch, rest = divmod(index, self.windows)
        return min(int(_order(seed, epoch, self.windows)[rest]) * UNIT, len(self.tokens) - length - 1)

    def even(self, rows: int, length: int) -> list[int]:
        """Where `rows` windows begin that are spread evenly."""
        if self.starts is not None:
            return [int(self.starts[i * len(self.starts) // rows]) * UNIT for i in range(rows)]
        gap = (len(self.tokens) - length - 1) // rows
        return [i * gap for i in range(rows)]

    def window(self, start: int, length: int, end_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, loss mask), each [length + 1]."""
        tokens = np.asarray(self.tokens[start : start + length + 1]).astype(np.int64)
        missing = length + 1 - len(tokens)
        if self.starts is not None and self.asked is not None:  # what follows the last document is padding
            asked = np.asarray(self.asked[start : start + length + 1])
            return np.pad(tokens, (0, missing), constant_values=end_id), np.pad(asked, (0, missing))
        if missing:
            raise SettingsError(
                f"{self.name} holds {len(self.tokens)} tokens, less than data.length {length}; lower it"
            )
        if self.begin is not None:
            tokens[0] = self.begin
        if self.asked is not None:
            return tokens, np.asarray(self.asked[start : start + length + 1])
        mask = np.ones(length + 1, dtype=bool)
        mask[1:] = tokens[:-1] != end_id
        return tokens, mask


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class Marks(NamedTuple):
    """A target's tokens that bound a text."""

    end: int  # of a document
    begin: int | None  # that every text begins with; None where the target has none


def read_marks(target: Path) -> Marks:
    """Both from the target's config.json and tokenizer_config.json.

    Raises:
        LoadError: a file that cannot be read, or a token that is no number.
    """
    config = read_json(target / "config.json")
    config = config if isinstance(config.get("eos_token_id", None), int | list) else {**config.get("text_config", {})}
    ends = config.get("eos_token_id", 0)
    end, begin = ends[0] if isinstance(ends, list) else ends, config.get("bos_token_id")
    beside = target / "tokenizer_config.json"
    told = read_json(beside).get("add_bos_token") if beside.exists() else None
    # transformers' Gemma tokenizers add it without saying so.
    needs = told if told is not None else str(config.get("model_type", "")).startswith("gemma")
    return Marks(end or 0, begin if needs and isinstance(begin, int) else None)


def open_source(path: Path, vocabulary: int, begin: int | None = None) -> Stream:
    """A source by its kind: .npz (array `all`), .npy (any shape, flattened) or a folder of regenerated answers.

    Args:
        begin: the token that every text of this target begins with, if any.

    Raises:
        SettingsError: missing, unreadable, or tokens outside the vocabulary; names the file.
    """
    try:
        if path.is_dir():
            stream = answers(_rows(path), str(path), begin)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                stream = Stream(str(path), arrays["all"], None, begin)
        else:
            stream = Stream(str(path), np.load(path, mmap_mode="r").reshape(-1), None, begin)
    except SettingsError:
        raise
    except FileNotFoundError:
        raise SettingsError(
            f"data.sources: {path} is missing; make it with `data` or `corpus` and `tokenizer`"
        ) from None
    except Exception as error:  # numpy raises many kinds for a broken file
        raise SettingsError(f"data.sources: {path} cannot be read ({error}); make it again") from error
    top = int(stream.tokens.max())
    if top >= vocabulary:
        raise SettingsError(f"data.sources: {path} holds token {top}, the target's vocabulary ends at {vocabulary - 1}")
    return stream


def open_heldout(path: Path | None, vocabulary: int, length: int, begin: int | None = None) -> list[Stream]:
    """One stream a domain from an .npz file with an array a domain (`all` only where there is no other), or from a
    folder of regenerated answers.

    Raises:
        SettingsError: missing, unreadable, too short, or tokens outside the vocabulary; names the file.
    """
    if path is None:
        return []
    if path.is_dir():
        return _heldout_answers(path, vocabulary, begin)
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in sorted(set(arrays.files) - {"all"}) or arrays.files}
    except Exception as error:  # numpy raises many kinds for a broken file
        raise SettingsError(f"data.heldout: {path} cannot be read ({error}); make it again, or leave it out") from error
    for name, tokens in found.items():
        if len(tokens) <= length + 1 or int(tokens.max()) >= vocabulary:
            raise SettingsError(
                f"data.heldout: {name} in {path} must hold more than {length + 1} tokens, all below {vocabulary}"
            )
    return [Stream(name, tokens, None, begin) for name, tokens in found.items()]


def _heldout_answers(folder: Path, vocabulary: int, begin: int | None) -> list[Stream]:
    by_domain: dict[str, list[Row]] = {}
    for row in _rows(folder):
        by_domain.setdefault(row.domain, []).append(row)
    streams = [answers(rows, f"{folder}: {name}", begin) for name, rows in sorted(by_domain.items())]
    for stream in streams:
        if int(stream.tokens.max()) >= vocabulary:
            raise SettingsError(f"data.heldout: {stream.name} holds a token above the vocabulary of {vocabulary}")
    return [replace(stream, name=name) for stream, name in zip(streams, sorted(by_domain), strict=True)]


class Row(NamedTuple):
    """One regenerated answer."""

    prompt: list[int]
    answer: list[int]
    domain: str


def answers(rows: Iterable[Row], name: str, begin: int | None) -> Stream:
    """Regenerated answers (`data`) one after another: prompts are context, answers are asked for.

    Where all begin with the token that the target's texts begin with, each is padded to whole units, so that rows can
    begin where answers do.
    """
    tokens: list[int] = []
    asked: list[bool] = []
    starts: list[int] | None = [] if begin is not None else None
    found = list(rows)
    if any(row.prompt[0] != begin for row in found):
        starts = None
    for row in found:
        tokens += [*row.prompt, *row.answer]
        asked += [False] * len(row.prompt) + [True] * len(row.answer)
        if starts is not None:
            starts.append((len(tokens) - len(row.prompt) - len(row.answer)) // UNIT)
            padding = -len(tokens) % UNIT
            tokens += [0] * padding
            asked += [False] * padding
    where = None if starts is None else np.array(starts)
    return Stream(name, np.array(tokens, dtype=np.int64), np.array(asked, dtype=bool), begin, where)


def _rows(folder: Path) -> Iterator[Row]:
    """The answers of a folder.

    Raises:
        SettingsError: none, or a damaged line; names it.
    """
    paths = sorted(folder.glob("answers*.jsonl"))
    if not paths:
        raise SettingsError(f"data.sources: {folder} holds no answers*.jsonl; `data --out {folder}` writes them")
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    found = Row(row["prompt_tokens"], row["answer_tokens"], row.get("domain", "all"))
                    _ = found.prompt[0], found.answer[:1]
                except (json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError):
                    raise SettingsError(
                        f"{path}, line {number}: not a regenerated answer; run `data` again to mend it"
                    ) from None
                yield found


@dataclass(frozen=True)
class Draw:
    """One row of a step: which window of which source."""

    source: int
    start: int


class Mixture:
    """Every step's rows, each source with its share, in an order that depends on the seed and the step alone."""

    def __init__(self, streams: Sequence[Stream], shares: Sequence[float], seed: int, end_id: int) -> None:
        if len(shares) != len(streams) or min(shares) < 0 or sum(shares) <= 0:
            raise SettingsError("data.shares must give each of data.sources a share, not negative, not all zero")
        self.streams, self.seed, self.end_id = list(streams), seed, end_id
        self.shares = [share / sum(shares) for share in shares]

    def counts(self, rows: int) -> list[int]:
        """Rows of each source, by largest remainder."""
        exact = [share * rows for share in self.shares]
        counts = [int(x) for x in exact]
        order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in order[: rows - sum(counts)]:
            counts[i] += 1
        return counts

    def draws(self, step: int, rows: int, length: int) -> list[Draw]:
        """The rows of a step, shuffled."""
        units, found = max(1, length // UNIT), []
        for source, count in enumerate(self.counts(rows)):
            stream = self.streams[source]
            for i in range(count):
                index = (step * count + i) * units
                found.append(Draw(source, stream.start(index, length, self.seed + source)))
        order = np.random.default_rng((self.seed, 7919, step)).permutation(rows)
        return [found[i] for i in order]

    def tokens(self, draws: Sequence[Draw], length: int) -> tuple[Tensor, Tensor]:
        """(tokens, loss mask), each [rows, length + 1]."""
        pairs = [self.streams[d.source].window(d.start, length, self.end_id) for d in draws]
        tokens = np.stack([tokens for tokens, _ in pairs])
        return torch.from_numpy(tokens), torch.from_numpy(np.stack([mask for _, mask in pairs]))

    def uniforms(self, step: int, rows: int, length: int) -> Tensor:
        """The step's random numbers [rows, length + 1], for all workers."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.rand((rows, length + 1), generator=generator)
