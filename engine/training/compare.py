"""The whole comparison: train or take every drafter, calibrate, decode held-out prompts, write the report.

Every step keeps its result below `runs`: the same command after a kill goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from engine.errors import LoadError
from engine.models.loader import read_json
from engine.schedule.calibrate import FILE, load_calibration, weights_hash
from engine.training.calibrate import calibrate
from engine.training.comparison import Arm, Comparison, differences
from engine.training.decoding import resolve_drafter
from engine.training.evaluate import Wish, measure, write_whole
from engine.training.loop import train
from engine.training.plan import Plan
from engine.training.settings import SettingsError, plain
from engine.training.states import States

Entry = dict[str, Any]


def finished(plan: Plan) -> bool:
    """Whether a run's newest checkpoint used its budget.

    Raises:
        StateError: the checkpoint is damaged.
    """
    state = States(plan.out / "states").load()
    if state is None or not (plan.out / "drafter" / "model.safetensors").exists():
        return False
    run = plan.run
    return bool((run.steps and state["step"] >= run.steps) or (run.minutes and state["used"] >= 60 * run.minutes))


class Work:
    """The steps of a comparison, each done once.

    Args:
        beside: the folder that recipes lie in.
    """

    def __init__(self, comparison: Comparison, beside: Path) -> None:
        self.comparison = comparison
        self.plans = {arm.name: comparison.plan(arm, beside) for arm in comparison.arms if arm.recipe}
        self.taken = {arm.name: Path(resolve_drafter(arm.drafter)) for arm in comparison.arms if arm.drafter}

    def drafter(self, arm: Arm) -> Path:
        """The arm's drafter, trained where it must be."""
        if arm.name in self.taken:
            return self.taken[arm.name]
        plan = self.plans[arm.name]
        if not finished(plan):
            _say(f"{arm.label}: training into {plan.out}")
            train(plan)
        return plan.out / "drafter"

    def wish(self, drafter: Path, temperature: float, prompts: Path, samples: int) -> Wish:
        """How to decode; one text a prompt says all there is at temperature 0."""
        c = self.comparison
        return Wish(
            c.target,
            (str(drafter),),
            prompts,
            temperature,
            tokens=c.tokens,
            samples=samples if temperature else 1,
            limit=c.limit or None,
            seed=c.seed,
            threads=c.threads,
            running=c.running,
        )

    def calibrate(self, arm: Arm, drafter: Path) -> None:
        """Fit the confidences of a drafter that has some, unless a fit of these weights lies beside it."""
        config, prompts = read_json(drafter / "config.json"), self.comparison.calibration
        if prompts is None or not config.get("enable_confidence_head"):
            return
        try:
            if load_calibration(drafter, config["block_size"]) is not None:
                return
        except LoadError:
            (drafter / FILE).unlink()  # of weights that are no more
        _say(f"{arm.label}: calibrating")
        for temperature in self.comparison.temperatures:
            samples = self.comparison.calibration_samples
            calibrate(replace(self.wish(drafter, temperature, prompts, samples), seed=7777), (temperature,))

    def measure(self, name: str, drafter: Path, temperature: float, samples: int) -> Entry:
        """A drafter's entry of the report, from an earlier run where nothing changed since."""
        wish = self.wish(drafter, temperature, self.comparison.prompts, samples)
        beside = drafter / FILE
        key = plain(wish) | {
            "drafters": weights_hash(drafter),
            "target": weights_hash(Path(wish.target)),
            "prompts": _digest(wish.prompts),
            "calibration": _digest(beside) if beside.exists() else None,
            "verification": wish.verification.value,
        }
        for irrelevant in ("threads", "running"):
            del key[irrelevant]
        path = self.comparison.runs / "measured" / f"{name}-T{temperature:g}.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                return dict(known["entry"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or half of one: measured anew
        _say(f"{name}: decoding at temperature {temperature:g}")
        _, entry = measure(wish, str(drafter))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "entry": entry}) + "\n")
        return entry

    def curve(self, arm: Arm, last: Entry) -> list[Entry]:
        """Accepted length of the drafters that `run.keep` left, and of the last one, by steps of training."""
        plan = self.plans.get(arm.name)
        if plan is None:
            return []
        points = []
        for share in sorted(plan.run.keep):
            folder = plan.out / "kept" / f"{100 * share:05.1f}"
            if share < 1 and (folder / "model.safetensors").exists():
                name = f"{arm.name}-{folder.name}"
                entry = self.measure(name, folder, self.comparison.temperatures[0], self.comparison.curve_samples)
                points.append({"share": share, "accepted_length": _lengths(entry)})
        return [*points, {"share": 1.0, "accepted_length": _lengths(last)}]

    def facts(self, arm: Arm, drafter: Path) -> Entry:
        """What an arm is: layers, head, weights, loss, steps."""
        config = read_json(drafter / "config.json")
        with safe_open(str(drafter / "model.safetensors"), framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys() if name not in ("d2t", "t2d")]  # noqa: SIM118
            parameters = sum(_product(part.get_shape()) for part in slices)
        plan = self.plans.get(arm.name)
        terms = plain(plan.model)["loss"] if plan is not None else {}
        loss = ", ".join(f"{v:g} {k.replace('_', ' ')}" for k, v in terms.items() if k not in ("decay",) and v)
        if not config.get("enable_confidence_head"):
            loss = ", ".join(part for part in loss.split(", ") if "confidence" not in part)
        return {
            "title": arm.label,
            "drafter": str(drafter),
            "layers": config.get("num_hidden_layers"),
            "block_size": config.get("block_size"),
            "draft_vocab_size": config.get("draft_vocab_size"),
            "parameters": parameters,
            "loss": loss,
            "steps": plan.run.steps if plan is not None else None,
        }


def compare(comparison: Comparison, beside: Path) -> Path:
    """Do what is missing and write report.json, report.md and the plots; returns the page.

    Raises:
        SettingsError, StateError, LoadError: names what is wrong and the mend.
    """
    from engine.training.comparison_report import write_report

    work, first = Work(comparison, beside), comparison.temperatures[0]
    main = [arm for arm in comparison.arms if arm.group == "main"]
    report: Entry = {"temperatures": list(comparison.temperatures), "arms": {}, "results": {}, "curve": {}, "depth": []}
    for arm in comparison.arms:
        drafter = work.drafter(arm)
        if arm.group == "main":
            work.calibrate(arm, drafter)
        for temperature in comparison.temperatures if arm.group == "main" else (first,):
            entry = work.measure(arm.name, drafter, temperature, comparison.samples)
            if arm.group == "main":
                report["results"].setdefault(f"{temperature:g}", {})[arm.label] = entry
            if temperature == first:
                macro = entry["macro"]
                point = {"layers": macro["layers"], "accepted_length": macro["accepted_length"]}
                report["depth"].append({"line": arm.line or arm.label, **point})
                if arm.group == "main":
                    report["arms"][arm.label] = work.facts(arm, drafter)
                    report["curve"][arm.label] = work.curve(arm, entry)
    steps = {arm.label: work.plans[arm.name] for arm in main if arm.name in work.plans}
    report["differences"] = differences(steps)
    report["settings"] = {name: value for name, value in plain(comparison).items() if name != "arms"}
    report["settings"]["target"] = _from_home(comparison.target)
    return write_report(report, comparison.out)


def _from_home(path: str) -> str:
    """A path below the user's home as `~/…`: a report is read elsewhere, too."""
    try:
        return str(Path("~", Path(path).relative_to(Path.home())))
    except ValueError:
        return path


def _lengths(entry: Entry) -> dict[str, float]:
    return {domain: found["accepted_length"] for domain, found in entry.items()}


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror})") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
