"""The configuration of a comparison: which drafters, trained how, and what is measured of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from engine.training.plan import Plan, build_plan, read_based
from engine.training.settings import SettingsError, build, explain, knob, override


@dataclass(frozen=True)
class Arm:
    """One drafter of a comparison: an entry of [[arms]]."""

    name: str = field(metadata={"help": "its folder below runs"})
    title: str = knob("", "its name in tables and plots; empty: name")
    recipe: str = knob("", "training configuration, beside this file; empty: `drafter` is taken as it is")
    drafter: str = knob("", "a trained drafter, as in --draft, instead of training one")
    set: tuple[str, ...] = knob((), 'overrides of the recipe, "KEY=VALUE"')
    group: Literal["main", "depth"] = knob("main", "main: in every table; depth: only in the sweep over layers")
    line: str = knob("", "the line of the sweep over layers that this belongs to; empty: its title")

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\ ") or self.name.startswith("."):
            raise SettingsError(f"name {self.name!r} must be a folder's name without spaces")
        if bool(self.recipe) == bool(self.drafter):
            raise SettingsError(f"{self.name}: give either recipe or drafter")

    @property
    def label(self) -> str:
        return self.title or self.name


@dataclass(frozen=True)
class Comparison:
    """What `compare` reads."""

    arms: tuple[Arm, ...] = knob((), "the drafters; the first is compared with each other one")
    target: str = knob("engine/demo/target", "target directory")
    runs: Path = knob(Path("build/runs"), "training runs and what was measured of them: what a kill leaves is used")
    out: Path = knob(Path("build/report"), "folder of report.md, report.json and the plots")
    prompts: Path = knob(Path("engine/demo/prompts/heldout.jsonl"), "prompts to evaluate on")
    calibration: Path | None = knob(None, "prompts to calibrate on, apart from `prompts`; absent: no calibration")
    temperatures: tuple[float, ...] = knob((1.0, 0.0), "the first is that of plots, sweeps and curves")
    tokens: int = knob(128, "tokens a text")
    samples: int = knob(1, "texts a prompt, at temperatures above 0")
    calibration_samples: int = knob(4, "texts a prompt to calibrate on, likewise")
    curve_samples: int = knob(1, "texts a prompt for each point of the curve by training budget")
    limit: int = knob(0, "prompts a domain; 0: all")
    seed: int = knob(0, "the same seed gives the same texts")
    threads: int = knob(1, "CPU threads of decoding")
    running: int = knob(32, "texts decoded side by side")
    overrides: tuple[str, ...] = knob((), 'of every recipe, after its own: "run.steps=20"')

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not any(arm.group == "main" for arm in self.arms):
            raise SettingsError("arms must name at least one drafter of group main")
        if len(set(names)) < len(names):
            raise SettingsError("arms: two have one name")
        if not self.temperatures or min(self.temperatures) < 0:
            raise SettingsError("temperatures must hold at least one, none negative")

    def plan(self, arm: Arm, beside: Path) -> Plan:
        """The training run of an arm.

        Args:
            beside: the folder that recipes lie in.

        Raises:
            SettingsError: the recipe cannot be used; names the file and key.
        """
        file = beside / arm.recipe
        tables = read_based(file)
        for assignment in (*arm.set, *self.overrides, f"target={self.target}", f"out={self.runs / arm.name}"):
            override(tables, assignment)
        return build_plan(tables, str(file))


def load_comparison(file: Path, assignments: list[str], only: tuple[str, ...] = ()) -> Comparison:
    """A comparison from a TOML file and overrides.

    Args:
        only: names of arms; empty for all.

    Raises:
        SettingsError: names the file, the key and the mend.
    """
    tables = read_based(file)
    for assignment in assignments:
        override(tables, assignment)
    arms = tables.get("arms", [])
    if not isinstance(arms, list):
        raise SettingsError(f"{file}: write each drafter as [[arms]]")
    unknown = sorted(set(only) - {arm.get("name") for arm in arms})
    if unknown:
        raise SettingsError(f"{file} has no arm {unknown[0]!r}; there are {', '.join(arm['name'] for arm in arms)}")
    if only:
        tables["arms"] = [arm for arm in arms if arm["name"] in only]
    return build(Comparison, tables, str(file))


def manual() -> str:
    """Every key with its default and meaning."""
    lines = ["configuration keys (TOML; --set KEY=VALUE overrides):", *explain(Comparison)[1:]]
    return "\n".join([*lines, "", "[[arms]], the drafters; the first is compared with each other one:", *explain(Arm)])


# What says when a run is saved, shown or sped up: it learns the same (a cache rounds features to bf16).
_WITHOUT_EFFECT = {("data", "cache"), *(("run", name) for name in ("keep", "log_every", "save_every", "save_steps"))}


def differences(plans: dict[str, Plan]) -> list[str]:
    """What the training runs do not have in common of data, optimiser and budget, in a reader's words."""
    found: list[str] = []
    for table in ("data", "optim", "run"):
        for name in (f.name for f in fields(getattr(next(iter(plans.values())), table))) if plans else ():
            if (table, name) in _WITHOUT_EFFECT:
                continue
            values: dict[str, Any] = {arm: getattr(getattr(plan, table), name) for arm, plan in plans.items()}
            if len({str(value) for value in values.values()}) > 1:
                found.append(f"{table}.{name}: " + ", ".join(f"{arm} {value}" for arm, value in values.items()))
    return found
