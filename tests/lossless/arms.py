"""The arms of the exact-law test: how to sample, who drafts, who decides lengths, how many at once."""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

import engine.engine
import engine.lookup
import engine.verify
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.schedule.cost import CostTable
from engine.types import EndConditions, Request, Sampling, Speculation, SpeculationMode, Verification
from kernels.filters import SamplingRows
from kernels.noise import Purpose
from kernels.reference import verify as reference_verify
from tests.engine.checkpoints import make_target, save_drafter, save_target
from tests.engine.lookahead import save_eagle3, save_mtp
from tests.lossless import drafters
from tests.lossless.exact import Tree, conditionals, enumerate_tree, joint_of_tokens_2_to_4
from tests.lossless.statistics import Fit, fit

VOCAB = 8
BLOCK = 3
PROMPTS = ((3,), (0, 5, 2), (6, 4, 0, 3, 7), (2, 0, 4, 4, 1, 7, 5, 6, 0, 2, 1))
WANTED = 4  # output tokens; those from the second on are counted


WARM = Sampling(temperature=1.0)


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    drafter: str  # one of REAL, near, same, never, split, none, or a mutant's name
    sampling: Sampling = WARM
    verification: Verification = Verification.REJECTION
    mode: SpeculationMode = SpeculationMode.FIXED
    running: int = 32
    seeded: bool = True
    reference: bool = False  # verified by kernels/reference
    mutant: bool = False
    policy: str = "fixed"  # of the engine; decides where the mode is AUTO
    changing: bool = False  # the number of requests in flight goes up and down
    copies: bool = False  # what followed the last equal token is copied
    on_device: bool = False  # rounds stay on the device

    @property
    def name(self) -> str:
        s = self.sampling
        parts = [f"T={s.temperature:g}"]
        parts += [f"top_p={s.top_p:g}"] if s.top_p < 1 else []
        parts += [f"top_k={s.top_k}"] if s.top_k else []
        parts += [f"min_p={s.min_p:g}"] if s.min_p else []
        parts += ["penalties"] if s.edits_logits else []
        parts += [self.verification.value, self.drafter]
        parts += [f"policy {self.policy}" if self.mode is SpeculationMode.AUTO else self.mode.value]
        parts += [f"1 to {self.running} at once" if self.changing else f"{self.running} at once"]
        if self.running == 1:
            parts[-1] = "alone"
        parts += [] if self.seeded else ["unseeded"]
        parts += ["copies"] if self.copies else []
        parts += ["rounds on the device"] if self.on_device else []
        return " ".join([*parts, *(["reference kernel"] if self.reference else [])])


PENALTIES = Sampling(
    temperature=1.0,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias=((2, 0.8), (5, -0.6)),
)
REUSED_NOISE = "draft noise as residual"
# Random weights: DSpark, Eagle3, both again with few draft ids, MTP-1.
REAL = ("random", "random few ids", "eagle3", "few ids", "mtp")
COUPLED, REJECTION = Verification.COUPLED, Verification.REJECTION
THRESHOLD, FIXED = SpeculationMode.THRESHOLD, SpeculationMode.FIXED
# Rows are nearly free up to forty and dear beyond, so that every load asks for other lengths.
COSTS = CostTable(
    verify=((1.0, 1.0), (40.0, 1.3), (160.0, 6.0)), draft=((1.0, 0.05), (32.0, 0.1)), absorb=((1.0, 0.01), (64.0, 0.02))
)
LOADS = (32, 2, 17, 1, 7)  # requests in flight, one after the other, where the load changes


def honest() -> list[Arm]:
    """Every arm that must follow the exact law."""
    cool, warm = Sampling(temperature=0.7), WARM
    top_p, top_k = Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=0.7, top_k=4)
    both = Sampling(temperature=1.0, top_k=6, top_p=0.9, min_p=0.05)
    near = [
        Arm("near", sampling, verification, mode)
        for sampling in (cool, warm, top_p, top_k, PENALTIES)
        for verification, mode in ((REJECTION, THRESHOLD), (COUPLED, FIXED))
    ]
    rigged = [
        Arm(drafter, sampling, REJECTION, mode)
        for drafter, sampling, mode in (
            ("same", warm, FIXED),
            ("never", cool, FIXED),
            ("never", top_k, THRESHOLD),
            ("random", warm, FIXED),
            ("random", replace(PENALTIES, top_p=0.9), THRESHOLD),
        )
    ]
    rigged += [Arm("random", cool, COUPLED, THRESHOLD), Arm("never", both, COUPLED, FIXED)]
    rigged += [Arm("same", cool, COUPLED, THRESHOLD), Arm("near", both, REJECTION, FIXED)]
    rigged += [Arm("near", replace(PENALTIES, temperature=0.7, top_k=5), REJECTION, FIXED)]
    rigged += [Arm("near", warm, REJECTION, FIXED, seeded=False), Arm("none", both, REJECTION, FIXED)]
    rigged += [Arm("split", warm, REJECTION, FIXED)]
    scheduled = [
        Arm("near", sampling, verification, SpeculationMode.AUTO, policy=policy, changing=True)
        for policy in ("fixed", "threshold", "causal", "relayed", "auto")
        for sampling in (cool, warm)
        for verification in (REJECTION, COUPLED)
    ]
    scheduled += [
        Arm("near", sampling, verification, SpeculationMode.AUTO, policy="auto", changing=True, copies=True)
        for sampling in (cool, warm, both, PENALTIES)
        for verification in (REJECTION, COUPLED)
    ]
    alone = [Arm("near", warm, REJECTION, THRESHOLD, 1), Arm("near", top_p, COUPLED, THRESHOLD, 1)]
    step_by_step = [
        Arm(drafter, sampling, verification, FIXED)
        for drafter, sampling, verification in (
            ("eagle3", both, REJECTION),
            ("eagle3", cool, COUPLED),
            ("few ids", warm, REJECTION),
            ("random few ids", warm, REJECTION),
            ("random few ids", top_p, COUPLED),
            ("mtp", top_p, REJECTION),
            ("mtp", PENALTIES, COUPLED),
        )
    ]
    ahead = [("fixed", warm), ("threshold", both), ("relayed", warm), ("relayed", top_p), ("auto", warm)]
    on_device = [
        Arm("random", sampling, verification, SpeculationMode.AUTO, policy=policy, changing=True, on_device=True)
        for policy, sampling in ahead
        for verification in (REJECTION, COUPLED)
    ]
    on_device += [Arm("none", warm, REJECTION, on_device=True), Arm("random few ids", warm, REJECTION, on_device=True)]
    return [*near, *rigged, *scheduled, *alone, *step_by_step, *on_device]


def mutants() -> list[Arm]:
    """Every arm that must be caught."""
    return [
        Arm("retrospective", mode=THRESHOLD, mutant=True),
        Arm("argmax as sampled", mutant=True),
        Arm("unnormalised top-k", mutant=True),
        Arm(REUSED_NOISE, reference=True, mutant=True),
    ]


@dataclass(frozen=True)
class Outcome:
    """What an arm showed."""

    arm: Arm
    fit: Fit
    rounds: int
    verified: int
    accepted: int
    copied: int  # of `verified`

    @property
    def passed(self) -> bool:
        """Honest arms keep to the law; mutants are thrown out. Seeds are fixed, so this never flickers."""
        if self.arm.mutant:
            return self.fit.p_value < 1e-6
        return self.fit.p_value > 1e-4 and self.fit.variation < 1.25 * self.fit.floor + 1e-3


@cache
def target() -> tuple[Path, Tree]:
    """The tiny target on disk and its enumerated tree."""
    model = make_target(
        vocab=VOCAB, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, positions=64, scale=12.0
    )
    directory = Path(mkdtemp(prefix="lossless-"))
    atexit.register(rmtree, directory, ignore_errors=True)
    save_target(directory / "target", model)
    save_drafter(directory / "random", model, block=BLOCK, layers=1, feature_layers=(0,), rank=8)
    few = directory / "random few ids"
    save_drafter(few, model, block=BLOCK, layers=1, feature_layers=(0,), rank=8, head="rnn", draft_ids=(6, 0, 3, 1))
    save_eagle3(directory / "eagle3", model, block=BLOCK, feature_layers=(0,))
    save_eagle3(directory / "few ids", model, block=BLOCK, feature_layers=(0,), draft_ids=(6, 0, 3, 1))
    save_mtp(directory / "mtp", model, block=2)
    return directory, enumerate_tree(model, PROMPTS)


def build(arm: Arm) -> Engine:
    """The real engine on the tiny target, with the arm's drafter attached.

    Its clock counts readings, so that a schedule made from measured rounds is the same every time.
    """
    directory, tree = target()
    real = str(directory / arm.drafter) if arm.drafter in REAL else "none"
    config = EngineConfig(
        model=str(directory / "target"),
        draft=real,
        policy=arm.policy,
        confidence_threshold=0.5,
        max_running=arm.running,
        prefill_chunk=40,
        prefix_cache=False,
        lookup=arm.copies,
        kv_memory=2**20,
    )
    loaded = load_engine(config, device_rounds=arm.on_device)
    ticks = itertools.count()
    clock = lambda: 1e-3 * next(ticks)
    if arm.on_device:
        parts = (config, loaded.target, loaded.drafter, loaded.pool.total, loaded.info)
        served = Engine(*parts, clock=clock, device_rounds=True)
        served.scheduler.use(COSTS)
        return served
    if arm.drafter in (*REAL, "none"):
        return loaded
    probability = conditionals(tree, arm.sampling)
    split = drafters.split(probability)
    tables = {"same": tree.logits, "never": drafters.never(probability), "split": split, REUSED_NOISE: split}
    logits = tables.get(arm.drafter, drafters.near(tree))
    kinds = {
        "retrospective": drafters.Retrospective,
        "argmax as sampled": drafters.ArgmaxAsSampled,
        "unnormalised top-k": drafters.UnnormalisedTopK,
    }
    kind: Any = kinds.get(arm.drafter, drafters.TableDrafter)
    drafter = kind(tree, logits, drafters.rigged_confidence(tree), BLOCK)
    served = Engine(config, loaded.target, drafter, loaded.pool.total, loaded.info, clock=clock)
    served.scheduler.use(COSTS)
    return served


def _plainly(
    logits: np.ndarray,
    tokens: np.ndarray,
    draft_logits: np.ndarray | None,
    log_z: np.ndarray | None,
    sampling: SamplingRows,
    *rows: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """`kernels.verify.verify_arrays` by the reference."""
    drafted = [None if part is None else torch.from_numpy(part) for part in (draft_logits, log_z)]
    offsets, lengths, owners, positions, proposals = (torch.from_numpy(row) for row in rows)
    found = reference_verify.verify(
        torch.from_numpy(logits), offsets, torch.from_numpy(tokens), lengths, *drafted, owners, sampling, positions,
        proposals,
    )  # fmt: skip
    return *(part.numpy() for part in found), np.full(len(lengths), np.nan)


@contextmanager
def mutation(arm: Arm) -> Iterator[None]:
    """What an arm changes in the engine: its verifier, and for one mutant the noise that draws the residual.

    Unseeded arms draw their seeds from a fixed generator meanwhile, so that the verdict is the same every time.
    """
    width = engine.lookup.WIDTH
    fast, residual, randbits = engine.verify.verify_arrays, reference_verify.RESIDUAL, engine.engine.secrets.randbits
    try:
        if arm.reference:
            engine.verify.verify_arrays = _plainly
        if arm.drafter == REUSED_NOISE:
            reference_verify.RESIDUAL = int(Purpose.DRAFT)
        if arm.copies:
            engine.lookup.WIDTH = 1
        if not arm.seeded:
            engine.engine.secrets.randbits = Random(99).getrandbits
        yield
    finally:
        engine.verify.verify_arrays, reference_verify.RESIDUAL = fast, residual
        engine.engine.secrets.randbits = randbits
        engine.lookup.WIDTH = width


def sample(arm: Arm, samples: int) -> Outcome:
    """Run `samples` requests through the engine and hold tokens 2 to 4 against the exact law."""
    _, tree = target()
    served = build(arm)
    counts = np.zeros((len(PROMPTS), VOCAB**3), np.int64)
    speculation = Speculation(arm.mode, confidence_threshold=0.5, verification=arm.verification)
    end = EndConditions(WANTED + 1)
    outputs: dict[str, list[int]] = {}
    submitted = done = rounds = verified = accepted = copied = 0
    with mutation(arm):
        while done < samples:
            most = min(arm.running, LOADS[done // 64 % len(LOADS)]) if arm.changing else arm.running
            while len(outputs) < most and submitted < samples:
                name = str(submitted)
                seed = submitted * 7919 + 1 if arm.seeded else None
                sampling = replace(arm.sampling, seed=seed)
                served.submit(Request(name, PROMPTS[submitted % len(PROMPTS)], end, sampling, speculation))
                outputs[name] = []
                submitted += 1
            for delta in served.step():
                assert not delta.error, delta.error
                tokens = outputs[delta.request_id]
                tokens += delta.tokens
                rounds += delta.decode_round
                verified += delta.verified
                accepted += delta.accepted
                if len(tokens) >= WANTED:
                    served.cancel(delta.request_id)
                    del outputs[delta.request_id]
                    cell = (tokens[1] * VOCAB + tokens[2]) * VOCAB + tokens[3]
                    counts[int(delta.request_id) % len(PROMPTS), cell] += 1
                    done += 1
            copied += sum(len(copy.tokens) for copy in served.scheduler.copies)
        assert not served.running
        while served.has_work:
            assert not served.step()
    if served.device_rounds is not None:
        assert served.device_rounds.seating.launched > 0.7 * served.rounds, "rounds were to stay on the device"
    served.check()
    assert served.pool.free == served.pool.total
    law = joint_of_tokens_2_to_4(conditionals(tree, arm.sampling), VOCAB)
    return Outcome(arm, fit(counts, law), rounds, verified, accepted, copied)
