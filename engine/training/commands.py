"""The commands of `python -m engine.training`; each imports its work only when it is the one to run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.training.evaluate import Wish


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
        "data": Command("let the target answer prompts", _data_options, _data),
        "train": Command("train a drafter for a target", lambda sub: _train_options(sub, arguments, drafter), _train),
        "evaluate": Command("decode held-out prompts for real", _evaluate_options, _evaluate),
        "calibrate": Command("fit the confidence head's calibration", _calibrate_options, _calibrate),
        "compare": Command(
            "train, calibrate and measure several drafters; write the report",
            lambda sub: _compare_options(sub, arguments),
            _compare,
        ),
        "export": Command("write a training state's drafter as it is served", _export_options, _export),
    }


def _data_options(sub: argparse.ArgumentParser) -> None:
    sub.description = """Let the target answer prompts through the engine: a drafter learns from what it will meet.

    python -m engine.training data --target engine/demo/target --prompts questions.jsonl --out build/own
    python -m engine.training data --target engine/demo/target --corpus build/corpus/train.npz --count 2000 \\
        --out build/own --tokens 192 --temperatures 1,1,0.7,0

Prompts are JSON lines with `prompt` (text) or `tokens` (ids), or pieces of a token file. Appends to OUT/answers.jsonl
as answers finish; the same command after a kill goes on with what is missing. Name OUT among train's data.sources."""
    sub.add_argument("--target", default="", help="target directory or hub id (default: the embedded one)")
    sub.add_argument("--draft", default="none", help="drafter that speeds this up (default none); changes no text")
    sub.add_argument("--prompts", type=Path, help="JSON lines")
    sub.add_argument("--corpus", type=Path, help="token file (.npz with `all`, or .npy) to cut prompts from")
    sub.add_argument("--count", type=_positive, default=1000, help="with --corpus: prompts (default %(default)s)")
    sub.add_argument("--prompt-tokens", type=_positive, default=64, help="with --corpus: their length (default 64)")
    sub.add_argument("--out", type=Path, required=True, help="folder of answers.jsonl")
    sub.add_argument("--tokens", type=_positive, default=192, help="longest answer (default %(default)s)")
    sub.add_argument("--samples", type=_positive, default=1, help="answers a prompt (default 1)")
    sub.add_argument("--temperatures", default="1", help="comma-separated, taken in turn (default 1)")
    sub.add_argument("--ignore-end", action="store_true", help="go on after the end token, to the longest answer")
    sub.add_argument("--seed", type=int, default=5, help="the same seed gives the same answers")
    sub.add_argument("--threads", type=_positive, default=1, help="CPU threads (default 1)")
    sub.add_argument("--running", type=_positive, default=48, help="answers decoded side by side (default 48)")


def _data(args: argparse.Namespace) -> None:
    from engine.training.decoding import DEMO
    from engine.training.regenerate import Job, regenerate

    temperatures = tuple(_temperature(text) for text in args.temperatures.split(","))
    names = ("draft", "prompts", "corpus", "count", "prompt_tokens", "tokens", "samples", "ignore_end", "seed")
    given = {name: getattr(args, name) for name in names}
    job = Job(target=args.target or str(DEMO / "target"), temperatures=temperatures, **given)
    print(regenerate(job, args.out, args.threads, args.running))


def _train_options(sub: argparse.ArgumentParser, arguments: list[str], drafter: str) -> None:
    sub.description = """Train a drafter for a frozen target.

    python -m engine.training train --config run.toml
    python -m engine.training train --drafter dspark --target engine/demo/target --out build/dspark \\
        --set data.sources='["build/corpus/train.npz", "build/own"]' --set run.minutes=30 --set model.head=gated

Writes OUT/drafter (serve it with --draft OUT/drafter), OUT/log.jsonl, OUT/tensorboard, OUT/states. The same command
after a kill goes on from the last checkpoint; a run by steps ends with the same weights as one that was never killed.

Several processes share each step and take the one that a single process would take, up to rounding:
    python -m engine.training train --config run.toml --set run.workers=2         two on this machine's CPU
    torchrun --standalone --nproc_per_node 8 -m engine.training train --config run.toml      a GPU each (NCCL), or CPUs
Each process holds the drafter, its optimiser and the whole frozen target: a target that does not fit one device
cannot be trained for here (it would have to be sharded)."""
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


def _decoding_options(sub: argparse.ArgumentParser, tokens: int) -> None:
    """What evaluate and calibrate share."""
    sub.add_argument("--target", default="", help="target directory or hub id (default: the embedded one)")
    sub.add_argument("--prompts", type=Path, help='JSON lines {"prompt": …, "domain": …} (default: the embedded ones)')
    sub.add_argument("--verification", choices=("rejection", "coupled"), default="rejection", help="default rejection")
    sub.add_argument("--tokens", type=_positive, default=tokens, help="tokens a text (default %(default)s)")
    sub.add_argument("--samples", type=_positive, default=1, help="texts a prompt (default 1)")
    sub.add_argument("--limit", type=_positive, help="prompts a domain (default: all)")
    sub.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts")
    sub.add_argument("--threads", type=_positive, default=1, help="CPU threads (default 1)")
    sub.add_argument("--running", type=_positive, default=16, help="texts decoded side by side (default 16)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature between 0 and 100")
    return value


def _wish(args: argparse.Namespace, drafters: tuple[str, ...], temperature: float) -> Wish:
    from engine.training.evaluate import HELDOUT, Wish
    from engine.types import Verification

    given = {"target": args.target} if args.target else {}
    return Wish(
        **given,
        drafters=drafters,
        prompts=args.prompts or HELDOUT,
        temperature=temperature,
        verification=Verification(args.verification),
        tokens=args.tokens,
        samples=args.samples,
        limit=args.limit,
        seed=args.seed,
        threads=args.threads,
        running=args.running,
    )


def _evaluate_options(sub: argparse.ArgumentParser) -> None:
    sub.description = """Decode prompts speculatively through the engine, whole blocks verified.

    python -m engine.training evaluate --drafters dspark,dflash --temperature 1 --json build/report.json
    python -m engine.training evaluate --drafters build/a/drafter --prompts mine.jsonl --json out.json --plots out

Writes {drafter: {domain: {accepted_length, acceptance_by_position, prompts, rounds}, "macro": {…}}}, a Markdown page
beside it, and PNG plots: conditional acceptance, accepted length by domain, block sizes, depths (where several are
given), thresholds, reliability before and after calibration. Accepted length counts the bonus token."""
    sub.add_argument("--drafters", required=True, help="comma-separated; names, directories or hub ids as in --draft")
    sub.add_argument("--temperature", type=_temperature, default=1.0, help="default 1")
    sub.add_argument("--json", type=Path, metavar="OUT", help="report; OUT with .md is its Markdown page")
    sub.add_argument("--plots", type=Path, metavar="FOLDER", help="PNG plots (needs matplotlib)")
    _decoding_options(sub, 96)


def _evaluate(args: argparse.Namespace) -> None:
    import json

    from engine.training.evaluate import evaluate
    from engine.training.report import markdown

    names = tuple(name.strip() for name in args.drafters.split(",") if name.strip())
    wish = _wish(args, names, args.temperature)
    report = evaluate(wish, args.json, args.plots)
    print(markdown(report, wish) if args.json else json.dumps(report))


def _calibrate_options(sub: argparse.ArgumentParser) -> None:
    sub.description = """Make a drafter's confidences probabilities: calibration.json beside it, applied when served.

    python -m engine.training calibrate --drafter build/dspark/drafter --target engine/demo/target \\
        --prompts calibration.jsonl --temperatures 1,0 --samples 4

Tries sequential temperature scaling (as published), a logistic map a position and a rising map of survival; half of the
prompts fit, the other half chooses. Use prompts that `evaluate` will not be asked about."""
    sub.add_argument("--drafter", required=True, help="name or directory")
    sub.add_argument("--temperatures", default="1", help="comma-separated sampling temperatures (default 1)")
    _decoding_options(sub, 160)


def _calibrate(args: argparse.Namespace) -> None:
    from engine.training.calibrate import calibrate

    temperatures = tuple(_temperature(text) for text in args.temperatures.split(","))
    print(calibrate(_wish(args, (args.drafter,), temperatures[0]), temperatures))


def _compare_options(sub: argparse.ArgumentParser, arguments: list[str]) -> None:
    sub.description = """Train (or take) several drafters on equal terms, calibrate, evaluate, and write the report.

    python -m engine.training compare --config engine/demo/recipes/report.toml
    python -m engine.training compare --config report.toml --only dspark,dflash --set overrides='["run.steps=100"]'

Writes OUT/report.md, report.json and plots: accepted lengths, conditional acceptance, curves by training budget
(recipes with run.keep), depths, block sizes, thresholds, reliability. Whatever is done is kept below `runs`: the same
command after a kill, or with one more drafter, does what is missing. calibration.json is written beside drafters that
have a confidence head and no calibration of their weights."""
    if arguments[:1] == ["compare"] and {"-h", "--help"} & set(arguments):
        from engine.training.comparison import manual

        sub.epilog = manual()
    sub.add_argument("--config", type=Path, required=True, help="TOML file with the keys below")
    sub.add_argument("--only", default="", metavar="NAMES", help="comma-separated arms (default: all)")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; may be repeated"
    )


def _compare(args: argparse.Namespace) -> None:
    from engine.training.compare import compare
    from engine.training.comparison import load_comparison

    only = tuple(name.strip() for name in args.only.split(",") if name.strip())
    print(compare(load_comparison(args.config, args.set, only), args.config.parent))


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.description = """Write the newest checkpoint of a training run as a drafter directory.

    python -m engine.training export --run build/dspark --out my-drafter

`train` exports at every checkpoint; this is for a run folder that was moved, or another place."""
    sub.add_argument("--run", type=Path, required=True, help="the folder that `train` wrote")
    sub.add_argument("--out", type=Path, required=True, help="the drafter's new directory")


def _export(args: argparse.Namespace) -> None:
    from engine.training.loop import export

    print(export(args.run, args.out))
