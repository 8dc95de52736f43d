"""The training loop: one step after another until the budget is used, resumable at any moment.

Knows no drafter: anything that satisfies `Trainable` runs in it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.training import trainable
from engine.training.draft_vocabulary import most_frequent
from engine.training.export import carry_notices, read_target
from engine.training.feature_cache import FeatureCache, Told
from engine.training.frozen import Frozen, halve
from engine.training.journal import Journal, means
from engine.training.labels import everywhere
from engine.training.optim import Optimizers, wsd
from engine.training.plan import Plan, build_plan
from engine.training.progress import Progress
from engine.training.settings import SettingsError, build, plain
from engine.training.sources import Draw, Mixture, Stream, open_heldout, open_source, read_marks
from engine.training.states import StateError, States, digest
from engine.training.trainable import Batch, Metrics
from engine.training.workers import Worker, start

MAY_DIFFER = ("run", "out")  # what a resumed run may change: budget, workers, device; the seed it may not


class Trainer:
    """One worker's share of a run.

    Raises:
        SettingsError, StateError: the run cannot start; names what and the mend.
    """

    def __init__(self, plan: Plan, worker: Worker) -> None:
        self.plan, self.worker = plan, worker
        torch.manual_seed(plan.run.seed)
        target = read_target(plan.target)
        if plan.run.precision == "bf16":
            halve(target)
        target = target.to(worker.device)
        marks = read_marks(plan.target)
        vocabulary = target.config.vocab_size
        streams = [open_source(path, vocabulary, marks.begin) for path in plan.data.sources]
        shares = plan.data.shares or (1.0,) * len(streams)
        self.mixture = Mixture(streams, shares, plan.run.seed + 21, marks.end)
        self.texts = open_heldout(plan.data.heldout, vocabulary, plan.data.length, marks.begin)
        self.states = States(plan.out / "states")
        state = self._find_state()
        self.draft_ids = state["draft_ids"] if state and "draft_ids" in state else self._count(vocabulary)
        shared = replace(Frozen(target, ()).shared, draft_ids=self.draft_ids)
        self.model = trainable.find(plan.drafter)(plan.model, shared).to(worker.device)
        if state is None:
            self.model.begin(target, streams, shares)
        self.frozen = Frozen(target, self.model.feature_layers)
        if plan.run.compile:
            self.frozen.quicken()
            self.model.quicken()
        self.cache = self._open_cache(streams)
        optim = plan.optim
        self.optimizers = Optimizers(
            self.model.named_parameters(), optim.muon_lr, optim.adam_lr, optim.weight_decay, optim.kind == "muon"
        )
        self.step, self.used = 0, 0.0
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizers.load(state["optimizers"])
            self.step, self.used = state["step"], state["used"]

    def _open_cache(self, streams: list[Stream]) -> FeatureCache | None:
        if self.plan.data.cache is None:
            return None
        data, layers = self.plan.data, list(self.model.feature_layers)
        weights = {path.name: digest(path) for path in sorted(self.plan.target.glob("*.safetensors"))}
        key = {"target": weights, "layers": layers, "precision": self.plan.run.precision}
        width = self.frozen.shared.config.hidden_size
        assert data.cache is not None
        leads, most = self.worker.leads, self._windows()
        return FeatureCache(data.cache, streams, data.length, len(layers), width, key, leads, self.reduced, most)

    def _windows(self) -> int | None:
        """Windows of the usual length that a budget in steps can meet at most."""
        run, data = self.plan.run, self.plan.data
        if not run.steps:
            return None
        rows = self.plan.rows(data.length)
        rows += -rows % self.worker.count
        counts = zip(self.mixture.counts(rows), self.mixture.streams, strict=True)
        return sum(min(run.steps * count, stream.windows) for count, stream in counts)

    @property
    def reduced(self) -> bool:
        """Whether only a part of the vocabulary may be drafted."""
        return self.model.vocabulary.ids is not None

    def _count(self, vocabulary: int) -> Tensor | None:
        """The run's draft vocabulary; a resumed run has that of its state, whatever became of the data."""
        count = getattr(self.plan.model, "draft_vocab", 0)
        if not count:
            return None
        ids, covered = most_frequent(self.mixture.streams, self.mixture.shares, count, vocabulary)
        if self.worker.leads:
            print(f"model.draft_vocab: {count:,} of {vocabulary:,} tokens, {covered:.2%} of the data", file=sys.stderr)
        return ids

    def _find_state(self) -> dict[str, Any] | None:
        """The newest checkpoint of this plan.

        Raises:
            StateError: it is damaged, or of another plan.
        """
        state = self.states.load()
        if state is None:
            return None
        stored = json.loads(state["plan"])
        try:  # a key that is younger than the state has its default there
            theirs = plain(build_plan(stored, str(self.states.folder)))
        except SettingsError:
            theirs = stored
        mine = plain(self.plan)
        for one in (mine, theirs):
            one["run.seed"] = one["run"]["seed"]
        for name in sorted({*mine, *theirs} - set(MAY_DIFFER)):
            if mine.get(name) != theirs.get(name):
                raise StateError(
                    f"{self.states.folder} belongs to a run whose {name} was {theirs.get(name)}, now it is "
                    f"{mine.get(name)}; give the old value, or another out"
                )
        return state

    @property
    def done(self) -> float:
        """Used share of the budget, in [0, 1]."""
        run = self.plan.run
        shares = [self.step / run.steps] if run.steps else []
        shares += [self.used / (run.minutes * 60)] if run.minutes else []
        return min(1.0, max(shares))

    def batch(self, tokens: Tensor, mask: Tensor, draws: Tensor, windows: list[Draw] | None = None) -> Batch:
        """Tokens with what the target says about them."""
        tokens = tokens.to(self.worker.device)
        device, cache = self.worker.device, self.cache if windows is not None else None
        told = cache.find(windows) if cache is not None and windows is not None else None
        if told is None:
            told = Told(*self.frozen.run(tokens))
            if cache is not None and windows is not None:
                if self.reduced:  # of the hidden states as they are kept, so that both make one distribution
                    hidden = told.hidden.bfloat16().float()
                    told = Told(*told[:2], *everywhere(hidden, mask.to(device), self.frozen.shared.head))
                told = cache.keep(windows, told)
        log_z, best = (None if part is None else part.to(device) for part in told[2:])
        features, hidden, mask, draws = (part.to(device) for part in (*told[:2], mask, draws))
        return Batch(tokens, features, hidden, mask, draws, self.frozen.shared, log_z, best)

    def autocast(self) -> torch.autocast:
        """bf16 products, when the run wants them."""
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.plan.run.precision == "bf16")

    def advance(self) -> tuple[Metrics, float]:
        """One step; returns the metrics of all workers and the gradient's norm."""
        done, worker = self.done, self.worker
        length = self.plan.length(done)
        rows = self.plan.rows(length)
        rows += -rows % worker.count
        windows = self.mixture.draws(self.step, rows, length)
        uniforms = self.mixture.uniforms(self.step, rows, length)
        own = windows[worker.rank * rows // worker.count : (worker.rank + 1) * rows // worker.count]
        tokens, mask = self.mixture.tokens(own, length)
        with self.autocast():
            cached = own if length == self.plan.data.length else None
            loss, metrics = self.model.loss(self.batch(tokens, mask, worker.share(uniforms), cached))
        loss.backward()
        norm = worker.add_gradients(self.model, self.plan.optim.clip)
        optim = self.plan.optim
        self.optimizers.step(wsd(self.step, done, optim.warmup, optim.decay))
        self.step += 1
        # Every worker's loss is its part of one weighted mean: they add up.
        part = torch.full((), 1.0 / worker.count, device=loss.device)
        return worker.add_metrics({**metrics, "loss": (loss.detach().float(), part)}), norm

    def save(self) -> None:
        """A checkpoint, and the drafter as it would be served."""
        if self.worker.leads:
            state = {"model": self.model.state_dict(), "optimizers": self.optimizers.state()}
            if self.draft_ids is not None:
                state["draft_ids"] = self.draft_ids
            plan = json.dumps(plain(self.plan))
            self.states.save(self.step, {**state, "step": self.step, "used": self.used, "plan": plan})
            self._export(self.plan.out / "drafter")

    def _export(self, folder: Path) -> None:
        self.model.export(folder)
        carry_notices(self.plan.target, folder)

    def keep(self, before: float) -> None:
        """Export the drafter into OUT/kept/PERCENT where a share of `run.keep` was passed since `before`."""
        for share in self.plan.run.keep if self.worker.leads else ():
            if before < share <= self.done:
                self._export(self.plan.out / "kept" / f"{100 * share:05.1f}")

    @torch.no_grad()
    def heldout(self) -> dict[str, dict[str, Any]]:
        """Teacher-forced metrics on held-out text of every domain, shared out among the workers."""
        found, length = {}, self.plan.data.length
        rows = 16 + -16 % self.worker.count
        draws = torch.rand((rows, length + 1), generator=torch.Generator().manual_seed(1))
        for stream in self.texts:
            starts = [Draw(0, at) for at in stream.even(rows, length)]
            picked = Mixture([stream], [1.0], 0, self.mixture.end_id).tokens(starts, length)
            tokens, mask = (self.worker.share(part) for part in picked)
            with self.autocast():
                _, metrics = self.model.loss(self.batch(tokens, mask, self.worker.share(draws)))
            found[stream.name] = means(self.worker.add_metrics(metrics))
        return found


def work(worker: Worker, plan: Plan) -> None:
    """Train until the budget is used."""
    trainer = Trainer(plan, worker)
    run = plan.run
    total = run.steps if run.steps else None
    saved, saved_step = trainer.used, trainer.step
    compiled: set[int] = set()
    with Journal(plan.out, trainer.step, worker.leads) as journal, _bar(plan, trainer, total) as bar:
        while trainer.done < 1.0:
            begun, length, before = time.perf_counter(), plan.length(trainer.done), trainer.done
            metrics, norm = trainer.advance()
            spent = time.perf_counter() - begun
            compiling, compiled = run.compile and length not in compiled, compiled | {length}
            # Compiling is no training: it would eat the few minutes that long rows get.
            trainer.used = worker.agree(trainer.used + (0.0 if compiling else spent))
            if worker.leads:
                journal.add(metrics)
                speed = plan.rows(length) * length / spent
                if trainer.step % run.log_every == 0:
                    journal.write(trainer.step, trainer.used, norm=norm, tokens_per_s=speed)
                at = trainer.step if run.steps else round(trainer.used)
                bar.update(
                    at,
                    f"loss {journal.mean('loss'):.3f} tau {journal.mean('tau'):.3f} · {speed:,.0f} tokens/s",
                )
            trainer.keep(before)
            late = trainer.used - saved >= run.save_every * 60
            late = late or (run.save_steps > 0 and trainer.step - saved_step >= run.save_steps)
            if late or trainer.done >= 1.0:
                saved, saved_step = trainer.used, trainer.step
                trainer.save()
                found = trainer.heldout()
                if worker.leads:
                    journal.heldout(trainer.step, trainer.used, found)


def _bar(plan: Plan, trainer: Trainer, total: int | None) -> Progress:
    title = f"train {plan.drafter}"
    if total is not None:
        return Progress(title, total, "steps", trainer.step)
    return Progress(title, plan.run.minutes * 60, "seconds", trainer.used)


def train(plan: Plan) -> Path:
    """Run a plan; returns the folder of the drafter.

    Raises:
        SettingsError, StateError: names what is wrong and the mend.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    if not (plan.target / "config.json").exists():
        raise SettingsError(f"target {plan.target} holds no config.json; give a Qwen3 or Gemma 3 directory")
    # Whatever can be refused is refused here, once, before any worker starts.
    trainable.find(plan.drafter)
    plan = replace(plan, target=plan.target.resolve())
    start(work, (plan,), plan.run.workers, plan.run.device, plan.run.threads)
    return plan.out / "drafter"


def export(run: Path, out: Path) -> Path:
    """Write the drafter of a run's newest checkpoint into `out`.

    Raises:
        StateError: no checkpoint, or a damaged one.
    """
    state = States(run / "states").load()
    if state is None:
        raise StateError(f"{run / 'states'} holds no checkpoint; give the folder that `train` wrote")
    tables = json.loads(state["plan"])
    kind = trainable.find(tables["drafter"])
    options = build(kind.Options, tables["model"], str(run), "model.")
    shared = replace(Frozen(read_target(Path(tables["target"])), ()).shared, draft_ids=state.get("draft_ids"))
    model = kind(options, shared)
    model.load_state_dict(state["model"])
    model.export(out)
    carry_notices(Path(tables["target"]), out)
    return out
