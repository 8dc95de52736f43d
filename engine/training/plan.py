"""The configuration of a training run: what `train` reads, and what its keys mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.training import trainable
from engine.training.settings import SettingsError, build, explain, knob, merge, override, read, table


@dataclass(frozen=True)
class DataTable:
    """[data]: what is read."""

    sources: tuple[Path, ...] = knob((), "token files (.npz with `all`, .npy) or folders that `data` wrote")
    shares: tuple[float, ...] = knob((), "each source's share of a step's rows; empty: equal")
    heldout: Path | None = knob(None, ".npz, an array a domain, or a folder that `data` wrote; reported at checkpoints")
    length: int = knob(256, "tokens a row")
    long: int = knob(2048, "tokens a row in the last part of the run, so that long context is known too")
    long_from: float = knob(0.92, "share of the budget after which rows are long")
    batch_tokens: int = knob(4096, "tokens a step, all workers together")
    cache: Path | None = knob(None, "folder that keeps the target's features on disk; its size is printed first")


@dataclass(frozen=True)
class OptimTable:
    """[optim]: how weights move."""

    kind: Literal["muon", "adamw"] = knob("muon", "muon: matrices by Muon, the rest by AdamW; adamw: all by AdamW")
    muon_lr: float = knob(1e-2, "peak learning rate of Muon")
    adam_lr: float = knob(3e-3, "peak learning rate of AdamW; the published recipe has 6e-4 at batch 512")
    weight_decay: float = knob(0.01, "decoupled, matrices only")
    warmup: int = knob(100, "steps of linear warm-up")
    decay: float = knob(0.25, "last share of the budget, in which the rate falls as 1 − √t")
    clip: float = knob(1.0, "largest norm of a step's gradient")


@dataclass(frozen=True)
class RunTable:
    """[run]: how long and on what."""

    steps: int = knob(0, "budget in steps; a run by steps is reproducible")
    minutes: float = knob(
        0.0, "budget in minutes of training, compiling not counted; with steps too, whichever ends first"
    )
    workers: int = knob(1, "processes; torchrun's own count wins")
    threads: int = knob(1, "threads of each worker")
    device: str = knob("auto", "cpu, cuda or auto (cuda where there is one)")
    compile: bool = knob(False, "torch.compile the layers; pays after a minute or two")
    precision: Literal["bf16", "fp32"] = knob("bf16", "of the products; weights and losses stay fp32")
    seed: int = knob(0, "of weights, data order and anchors")
    save_every: float = knob(4.0, "minutes between checkpoints: what a kill can cost")
    save_steps: int = knob(0, "steps between checkpoints, when not 0")
    log_every: int = knob(20, "steps between lines of log.jsonl")
    keep: tuple[float, ...] = knob((), "shares of the budget at which the drafter is kept, in OUT/kept: for curves")


@dataclass(frozen=True)
class Plan:
    """A training run."""

    target: Path = field(metadata={"help": "the target's directory (Qwen3 or Gemma 3, Hugging Face layout)"})
    out: Path = field(metadata={"help": "the run's folder: states/, log.jsonl, drafter/"})
    drafter: str = knob("dspark", f"one of {', '.join(trainable.names())}")
    data: DataTable = table(DataTable, "what is read")
    optim: OptimTable = table(OptimTable, "how weights move")
    run: RunTable = table(RunTable, "how long and on what")
    model: Any = knob(None, "the drafter's own table")

    def __post_init__(self) -> None:
        data, run = self.data, self.run
        if run.steps <= 0 and run.minutes <= 0:
            raise SettingsError("run.steps or run.minutes must be given: the budget")
        if not data.sources:
            raise SettingsError("data.sources must name at least one source")
        if data.length < 32 or data.long < data.length:
            raise SettingsError(
                f"data.length {data.length} must be at least 32 and data.long {data.long} no less than it"
            )
        for name, value in (
            ("run.workers", run.workers),
            ("run.threads", run.threads),
            ("run.log_every", run.log_every),
        ):
            if value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        if any(not 0 < share <= 1 for share in run.keep):
            raise SettingsError(f"run.keep {list(run.keep)} must hold shares of the budget, above 0 and at most 1")

    def rows(self, length: int) -> int:
        """Rows of a step at `length` tokens: at least four, so that a few long rows still make a batch."""
        return max(4, self.data.batch_tokens // length)

    def length(self, done: float) -> int:
        """Tokens a row when `done` of the budget is used."""
        return self.data.long if done >= self.data.long_from else self.data.length


def load_plan(file: Path | None, assignments: list[str]) -> Plan:
    """A plan from a TOML file (or nothing) and overrides.

    Raises:
        SettingsError: names the file or override, the key and the mend.
    """
    tables = read_based(file) if file is not None else {}
    source = str(file) if file is not None else "the command line"
    for assignment in assignments:
        override(tables, assignment)
    return build_plan(tables, source)


def read_based(file: Path) -> dict[str, Any]:
    """The tables of a TOML file over those of the file that its `base` names, relative to it.

    Raises:
        SettingsError: a file is missing or no TOML, or names itself.
    """
    tables, seen = read(file), [file.resolve()]
    while "base" in tables:
        name = tables.pop("base")
        if not isinstance(name, str):
            raise SettingsError(f"{file}: base must be a path, got {name!r}")
        file = file.parent / name
        if file.resolve() in seen:
            raise SettingsError(f"{file}: base leads back to it")
        seen.append(file.resolve())
        tables = merge(read(file), tables)
    return tables


def build_plan(tables: dict[str, Any], source: str) -> Plan:
    """A plan from nested tables, those of an older state too: what they lack has its default.

    Raises:
        SettingsError: names the source, the key and the mend.
    """
    tables = dict(tables)
    options = tables.pop("model", {})
    name = tables.get("drafter", "dspark")
    try:
        kind = trainable.find(name)
    except KeyError as error:
        raise SettingsError(f"{source}: {error.args[0]}") from None
    if not isinstance(options, dict):
        raise SettingsError(f"{source}: model must be a table")
    tables["model"] = build(kind.Options, options, source, "model.")
    return build(Plan, tables, source)


def manual(drafter: str) -> str:
    """Every key of a configuration with its default and meaning."""
    lines = ['configuration keys (TOML; --set KEY=VALUE overrides; `base = "FILE"` takes what is not said from there):']
    lines += [line for line in explain(Plan) if not line.startswith("  model ")]
    lines += ["", f"[model] of --drafter {drafter}:"]
    return "\n".join([*lines, *explain(trainable.find(drafter).Options, "model.")])
