"""Real decoding of many prompts through the engine, and what every round said: confidences and acceptance."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.training.progress import Progress
from engine.training.settings import SettingsError
from engine.types import (
    DraftBlock,
    EndConditions,
    FinishReason,
    Request,
    Sampling,
    Speculation,
    SpeculationMode,
    StepPlan,
    TokenDelta,
    Verdict,
    Verification,
)

DEMO = Path(__file__).resolve().parent.parent / "demo"


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    text: str
    domain: str
    line: int


def read_prompts(path: Path) -> list[Prompt]:
    """`{"prompt": …, "domain": …}` a line; bad lines are reported with their number, skipped and counted.

    Raises:
        SettingsError: no such file, or no usable line in it.
    """
    found, bad = [], 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, domain = row["prompt"], row.get("domain", "all")
            if not (isinstance(text, str) and text and isinstance(domain, str) and domain != "macro"):
                raise ValueError("prompt must be a text that is not empty, domain a text other than macro")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            bad += 1
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            print(f"{path}, line {number}: skipped: {reason}", file=sys.stderr)
            continue
        found.append(Prompt(text, domain, number))
    if bad:
        print(f"{path}: {bad} of {bad + len(found)} lines skipped", file=sys.stderr)
    if not found:
        raise SettingsError(f'{path} holds no prompt; write {{"prompt": "…", "domain": "…"}} a line')
    return found


def resolve_drafter(name: str) -> str:
    """What the server's --draft means: an embedded drafter's name, a directory or a hub id.

    Raises:
        SettingsError: a name of which no drafter is embedded.
    """
    if Path(name).is_dir() or "/" in name:
        return name
    embedded = sorted(p.parent.name for p in DEMO.glob("*/config.json") if p.parent.name != "target")
    if name not in embedded:
        raise SettingsError(f"no drafter {name!r}; embedded are {', '.join(embedded)}, or give a directory")
    return str(DEMO / name)


@dataclass
class Rounds:
    """Decode rounds of one domain; every round drafted and verified a whole block."""

    block: int
    prompts: int = 0
    tokens: int = 0  # committed in decode rounds
    rounds: int = 0
    verified: list[int] = field(default_factory=list)  # by position
    accepted: list[int] = field(default_factory=list)
    confidence: list[tuple[float, ...]] = field(default_factory=list)  # raw, [γ] a round
    kept: list[int] = field(default_factory=list)  # tokens accepted, a round
    known: list[int] = field(default_factory=list)  # positions whose outcome is known: fewer where the text ended

    def __post_init__(self) -> None:
        self.verified = self.verified or [0] * self.block
        self.accepted = self.accepted or [0] * self.block

    def add(self, delta: TokenDelta, confidence: tuple[float, ...] | None) -> None:
        """Take in one decode round."""
        self.rounds += 1
        self.tokens += len(delta.tokens)
        ended = delta.finish is FinishReason.STOP_ID and len(delta.tokens) <= delta.accepted
        known = len(delta.tokens) if ended else delta.verified
        for k in range(known):
            self.verified[k] += 1
            self.accepted[k] += k < delta.accepted
        if confidence is not None:
            self.confidence.append(confidence)
            self.kept.append(delta.accepted)
            self.known.append(known)

    def join(self, other: Rounds) -> Rounds:
        """Both together."""
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("prompts", "tokens", "rounds"))
        counts = [one + two for one, two in pairs]
        lists = [getattr(self, n) + getattr(other, n) for n in ("confidence", "kept", "known")]
        sums = [
            [one + two for one, two in zip(getattr(self, n), getattr(other, n), strict=True)]
            for n in ("verified", "accepted")
        ]
        return Rounds(self.block, counts[0], counts[1], counts[2], sums[0], sums[1], *lists)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(confidence [n, γ], kept [n], known [n]) of rounds that know their whole block's outcome or a part."""
        return np.array(self.confidence).reshape(-1, self.block), np.array(self.kept), np.array(self.known)


def open_engine(target: str, draft: str, threads: int, running: int = 16) -> tuple[Engine, Tokenizer]:
    """An engine that verifies whole blocks, its drafter uncalibrated, and the target's tokenizer.

    Raises:
        LoadError: the checkpoint's trouble, named.
    """
    from engine.models.hub import resolve

    directory = resolve(target, None)
    config = EngineConfig(
        str(directory), draft, threads=threads, kv_memory=2**29, max_running=running, max_queue=2**20, policy="fixed"
    )
    engine = load_engine(config)
    engine.calibration = None
    path = directory / "tokenizer.json"
    if not path.exists():
        raise SettingsError(f"{path} is missing; the target's tokenizer reads the prompts")
    return engine, Tokenizer.from_file(str(path))


class Recorder:
    """Stands before a verifier and remembers each plan's confidences by request."""

    def __init__(self, engine: Engine) -> None:
        self._inner = engine.verifier.run
        self.confidence: dict[str, tuple[float, ...]] = {}
        engine.verifier.run = self.run  # type: ignore[method-assign]

    def run(self, plan: StepPlan, block: DraftBlock | None) -> Verdict:
        """The verifier's own verdict."""
        self.confidence.clear()
        if block is not None and block.confidence is not None:
            for sequence, row in zip(block.sequences, block.confidence.tolist(), strict=True):
                self.confidence[sequence.request.request_id] = tuple(row)
        return self._inner(plan, block)


def decode(
    engine: Engine,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    verification: Verification = Verification.REJECTION,
    title: str = "decode",
) -> dict[str, Rounds]:
    """Decode (domain, prompt tokens) pairs, whole blocks verified; rounds by domain.

    A text stops at the target's end token or at the first round boundary with at least `tokens` tokens, so that
    no round is cut short by a limit. The same seed gives the same texts and the same rounds.
    """
    info = engine.info
    recorder, domains, lengths = Recorder(engine), {}, {}
    room = info.max_model_len - tokens - info.block_size - 2
    end = EndConditions(tokens + info.block_size + 1, 0, frozenset(info.eos_ids))
    speculation = Speculation(SpeculationMode.FIXED, verification=verification)
    found: dict[str, Rounds] = {}
    for index, (domain, prompt) in enumerate(prompts):
        if room < 1 or not prompt:
            raise SettingsError(f"{tokens} tokens do not fit the context of {info.max_model_len}; ask for fewer")
        name = f"{seed}-{index}"
        domains[name], lengths[name] = domain, 0
        found.setdefault(domain, Rounds(info.block_size)).prompts += 1
        sampling = Sampling(temperature, seed=seed * 1_000_003 + index)
        engine.submit(Request(name, tuple(prompt[-room:]), end, sampling, speculation))
    try:
        with Progress(title, len(prompts) * tokens, "tokens") as bar:
            while engine.has_work:
                for delta in engine.step():
                    name = delta.request_id
                    lengths[name] += len(delta.tokens)
                    if delta.decode_round:
                        found[domains[name]].add(delta, recorder.confidence.get(name))
                    if delta.finish is FinishReason.ERROR:
                        raise SettingsError(f"prompt {name}: {delta.error}; the drafter or target is damaged")
                    if delta.finish is None and lengths[name] >= tokens:
                        engine.cancel(name)
                bar.update(sum(min(count, tokens) for count in lengths.values()))
    finally:
        engine.reset()
        engine.verifier.run = recorder._inner  # type: ignore[method-assign]
    return found


def merge(found: dict[str, Rounds]) -> Rounds:
    """All domains together."""
    parts = list(found.values())
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.join(part)
    return whole


def domain_report(rounds: Rounds) -> dict[str, Any]:
    """Accepted length (bonus token included) and acceptance at each position given all before it."""
    reached = [rounds.rounds, *rounds.accepted[:-1]]
    reached = [min(v, r) for v, r in zip(rounds.verified, reached, strict=True)]
    return {
        "accepted_length": round(rounds.tokens / max(1, rounds.rounds), 4),
        "acceptance_by_position": [
            round(a / r, 4) if r else None for a, r in zip(rounds.accepted, reached, strict=True)
        ],
        "prompts": rounds.prompts,
        "rounds": rounds.rounds,
        "verified_by_position": rounds.verified,
        "accepted_by_position": rounds.accepted,
    }
