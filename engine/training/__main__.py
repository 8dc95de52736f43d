"""Make, measure and calibrate drafters.

    python -m engine.training data       let the target answer prompts: text to train on
    python -m engine.training train      train a drafter for a target
    python -m engine.training evaluate   decode held-out prompts for real: accepted lengths, reliability, plots
    python -m engine.training calibrate  fit the confidence head's calibration, kept beside the drafter
    python -m engine.training compare    all of that for several drafters on equal terms, and the report
    python -m engine.training export     write a training state's drafter as it is served

Each has --help with examples. engine.training.gather writes prompts for a target that was trained elsewhere. The
embedded target's own recipe is further modules: engine.training.corpus, .tokenizer, .pretrain and .prompts.
"""

from __future__ import annotations

import argparse
import sys

from engine.errors import InvalidRequest, LoadError
from engine.training import commands
from engine.training.settings import SettingsError
from engine.training.states import StateError
from engine.training.workers import leave, under_torchrun


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 for bad input, which is explained on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.load(sys.argv[1:] if arguments is None else arguments).items():
        sub = chosen.add_parser(name, help=command.summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.prepare(sub)
        sub.set_defaults(perform=command.run)
    args = parser.parse_args(arguments)
    try:
        args.perform(args)
    except (SettingsError, StateError, LoadError, InvalidRequest, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    if under_torchrun():
        leave(code)
    sys.exit(code)
