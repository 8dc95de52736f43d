"""Accepted lengths, conditional acceptance and reliability of drafters, by decoding held-out prompts for real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.models.loader import read_json
from engine.schedule.calibrate import load_calibration
from engine.training.decoding import (
    DEMO,
    Prompt,
    Rounds,
    decode,
    domain_report,
    merge,
    open_engine,
    read_prompts,
    resolve_drafter,
)
from engine.training.reliability import block_sweep, reliability, threshold_sweep
from engine.types import Verification

HELDOUT = DEMO / "prompts" / "heldout.jsonl"


@dataclass(frozen=True)
class Wish:
    """What to evaluate, and how."""

    target: str = str(DEMO / "target")
    drafters: tuple[str, ...] = ("dspark",)
    prompts: Path = HELDOUT
    temperature: float = 1.0
    verification: Verification = Verification.REJECTION
    tokens: int = 96  # a prompt
    samples: int = 1  # texts a prompt
    limit: int | None = None  # prompts a domain
    seed: int = 0
    threads: int = 1
    running: int = 16


def choose(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each domain."""
    taken: dict[str, int] = {}
    found = []
    for prompt in prompts:
        taken[prompt.domain] = taken.get(prompt.domain, 0) + 1
        if limit is None or taken[prompt.domain] <= limit:
            found.append(prompt)
    return found


def measure(wish: Wish, name: str) -> tuple[dict[str, Rounds], dict[str, Any]]:
    """(rounds by domain, the drafter's entry of the report)."""
    directory = resolve_drafter(name)
    engine, tokenizer = open_engine(wish.target, directory, wish.threads, wish.running)
    prompts = choose(read_prompts(wish.prompts), wish.limit)
    encoded = [(p.domain, tokenizer.encode(p.text).ids) for p in prompts]
    found: dict[str, Rounds] = {}
    for sample in range(wish.samples):
        fresh = decode(
            engine,
            [pair for pair in encoded if pair[1]],
            tokens=wish.tokens,
            temperature=wish.temperature,
            seed=wish.seed + sample,
            verification=wish.verification,
            title=f"{name} {sample + 1}/{wish.samples}",
        )
        found = {domain: found[domain].join(part) if domain in found else part for domain, part in fresh.items()}
    return found, summarise(wish, name, directory, found)


def summarise(wish: Wish, name: str, directory: str, found: dict[str, Rounds]) -> dict[str, Any]:
    """The report's entry of one drafter: domains, and `macro`, their unweighted mean, with all else about it."""
    report: dict[str, Any] = {domain: domain_report(rounds) for domain, rounds in found.items()}
    whole = merge(found)
    confidence, kept, known = whole.arrays()
    macro: dict[str, Any] = {
        "accepted_length": round(float(np.mean([r["accepted_length"] for r in report.values()])), 4),
        "acceptance_by_position": domain_report(whole)["acceptance_by_position"],
        "rounds": whole.rounds,
        **shape(Path(directory)),
    }
    if len(kept):
        macro["block_sweep"] = block_sweep(kept, whole.block)
        macro["threshold_sweep"] = threshold_sweep(confidence, kept)
        macro["confidence"] = {"raw": reliability(confidence, kept, known)}
        calibration = load_calibration(Path(directory), whole.block) if Path(directory).is_dir() else None
        method = calibration.method(wish.verification, wish.temperature) if calibration is not None else None
        if method is not None:
            calibrated = method.apply(confidence)
            macro["confidence"]["calibrated"] = reliability(calibrated, kept, known)
            macro["threshold_sweep"] = threshold_sweep(calibrated, kept)
    else:
        counts = np.array(whole.accepted) / max(1, whole.rounds)
        macro["block_sweep"] = [
            {"block_size": k + 1, "accepted_length": round(1 + float(counts[: k + 1].sum()), 4)}
            for k in range(whole.block)
        ]
    report["macro"] = macro
    return report


def shape(directory: Path) -> dict[str, Any]:
    """What a drafter is, for sweeps over depth and design."""
    if not directory.is_dir():
        return {}
    config = read_json(directory / "config.json")
    head = config.get("markov_head_type", "none") if config.get("markov_rank") else "none"
    return {"layers": config.get("num_hidden_layers"), "head": head, "block_size": config.get("block_size")}


def write_whole(path: Path, text: str) -> None:
    """A text file that a reader, or a kill, never sees half done."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def evaluate(wish: Wish, out: Path | None, folder: Path | None) -> dict[str, Any]:
    """The whole report: {drafter: {domain: …, "macro": …}}; written as JSON, Markdown and pictures where asked.

    Args:
        out: the JSON file; its Markdown table goes beside it.
        folder: for PNG plots, None for none.
    """
    from engine.training.report import markdown

    report = {}
    for name in wish.drafters:
        _, report[name] = measure(wish, name)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(report, indent=1) + "\n")
        write_whole(out.with_suffix(".md"), markdown(report, wish))
    if folder is not None:
        from engine.training.plots import draw

        draw(report, folder)
    return report
