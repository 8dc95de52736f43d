"""The calibrate command: decode, fit, choose, write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.training.calibration import Rows, entry, fit, write
from engine.training.decoding import Rounds, decode, open_engine, read_prompts, resolve_drafter
from engine.training.evaluate import Wish, choose
from engine.training.settings import SettingsError


def rows_of(rounds: dict[str, Rounds]) -> Rows:
    """All domains' rounds."""
    parts = [part.arrays() for part in rounds.values()]
    return Rows(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def calibrate(wish: Wish, temperatures: tuple[float, ...]) -> Path:
    """Fit the drafter's confidences at each temperature and write calibration.json beside it.

    Prompts are split in two, every other one: one half fits, the other chooses the method. Neither may be among
    those that `evaluate` is asked about.

    Raises:
        SettingsError: the drafter has no confidence head, or too few rounds.
    """
    name = wish.drafters[0]
    directory = Path(resolve_drafter(name))
    engine, tokenizer = open_engine(wish.target, str(directory), wish.threads, wish.running)
    if not engine.info.has_confidence:
        raise SettingsError(f"{directory} has no confidence head: there is nothing to calibrate")
    prompts = choose(read_prompts(wish.prompts), wish.limit)
    encoded = [(p.domain, tokenizer.encode(p.text).ids) for p in prompts]
    entries: list[dict[str, Any]] = []
    for temperature in temperatures:
        halves = []
        for half in range(2):
            parts: list[Rows] = []
            for sample in range(wish.samples):
                rounds = decode(
                    engine,
                    [pair for pair in encoded[half::2] if pair[1]],
                    tokens=wish.tokens,
                    temperature=temperature,
                    seed=wish.seed + 100 * half + sample,
                    verification=wish.verification,
                    title=f"T={temperature:g} {'choosing' if half else 'fitting'} {sample + 1}/{wish.samples}",
                )
                parts.append(rows_of(rounds))
            columns = ([getattr(part, key) for part in parts] for key in ("confidence", "kept", "known"))
            halves.append(Rows(*(np.concatenate(column) for column in columns)))
        found = fit(*halves)
        entries.append(entry(found, wish.verification, temperature))
        for method, measured in found["measured"].items():
            mark = "*" if method == found["method"] else " "
            print(
                f"{mark} T={temperature:g} {method:<13} ECE mean {100 * measured['ece_mean']:.2f} % "
                f"worst {100 * measured['ece_worst']:.2f} % AUC {measured['auc_mean']}",
                file=sys.stderr,
            )
    return write(directory, engine.info.block_size, entries)
