"""The commands of `python -m engine.training`; each imports its work only when it is the one to run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    prepare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _drafter_of(arguments: list[str]) -> str:
    """The drafter whose [model] table --help explains."""
    for index, word in enumerate(arguments):
        if word.startswith("--drafter="):
            return word.partition("=")[2]
        if word == "--drafter" and index + 1 < len(arguments):
            return arguments[index + 1]
    return "dspark"


def load(arguments: list[str]) -> dict[str, Command]:
    """Every command by name."""
    drafter = _drafter_of(arguments)
    return {
        "train": Command("train a drafter for a target", lambda sub: _train_options(sub, arguments, drafter), _train),
        "export": Command("write a training state's drafter as it is served", _export_options, _export),
    }


def _train_options(sub: argparse.ArgumentParser, arguments: list[str], drafter: str) -> None:
    sub.description = """Train a drafter for a frozen target.

    python -m engine.training train --config run.toml
    python -m engine.training train --drafter dspark --target engine/demo/target --out build/dspark \\
        --set data.sources='["build/corpus/train.npz", "build/own"]' --set run.minutes=30 --set model.head=gated

Writes OUT/drafter (serve it with --draft OUT/drafter), OUT/log.jsonl, OUT/states. The same command after a kill goes
on from the last checkpoint; a run by steps ends with the same weights as one that was never killed."""
    if arguments[:1] == ["train"] and {"-h", "--help"} & set(arguments):
        from engine.training.plan import manual
        from engine.training.trainable import names

        sub.epilog = manual(drafter if drafter in names() else "dspark")
    sub.add_argument("--config", type=Path, help="TOML file with the keys below")
    sub.add_argument("--drafter", help="short for --set drafter=…; its [model] keys are explained below")
    sub.add_argument("--target", help="short for --set target=…")
    sub.add_argument("--out", help="short for --set out=…")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; may be repeated"
    )


def _train(args: argparse.Namespace) -> None:
    from engine.training.loop import train
    from engine.training.plan import load_plan

    short = [f"{name}={getattr(args, name)}" for name in ("drafter", "target", "out") if getattr(args, name)]
    print(train(load_plan(args.config, [*short, *args.set])))


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.description = """Write the newest checkpoint of a training run as a drafter directory.

    python -m engine.training export --run build/dspark --out my-drafter

`train` exports at every checkpoint; this is for a run folder that was moved, or another place."""
    sub.add_argument("--run", type=Path, required=True, help="the folder that `train` wrote")
    sub.add_argument("--out", type=Path, required=True, help="the drafter's new directory")


def _export(args: argparse.Namespace) -> None:
    from engine.training.loop import export

    print(export(args.run, args.out))
