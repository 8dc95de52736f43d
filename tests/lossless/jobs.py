"""The table's parts as jobs for worker processes: each returns finished lines of figures.

Imports wait until a job runs: a worker sets threads and silence first.
"""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]
MUTANT_SAMPLES = 10_000  # enough to throw any of them out


def prepare() -> None:
    """One thread a process, and no progress bars from transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def law(index: int, samples: int) -> list[Line]:
    """One arm of the exact-law test; mutants follow the honest ones."""
    from tests.lossless.arms import honest, mutants, sample

    arm = [*honest(), *mutants()][index]
    outcome = sample(arm, min(samples, MUTANT_SAMPLES) if arm.mutant else samples)
    fit, rounds = outcome.fit, max(outcome.rounds, 1)
    return [
        {
            "part": "mutants, to be rejected (p < 1e-6)" if outcome.arm.mutant else "exact law of tokens 2 to 4",
            "arm": outcome.arm.name,
            "passed": outcome.passed,
            "samples": fit.samples,
            "cells": fit.cells,
            "p": fit.p_value,
            "tv": fit.variation,
            "tv_floor": fit.floor,
            "verified_per_round": outcome.verified / rounds,
            "accepted_per_round": outcome.accepted / rounds,
        }
    ]


def seeds(count: int) -> list[Line]:
    """Coupled texts by seed, with drafters of every family."""
    from tests.lossless.arms import REAL
    from tests.lossless.coupled import agreement

    return [
        {
            "part": "coupled: one seed, one text",
            "arm": a.name,
            "passed": a.passed,
            "seeds": a.seeds,
            "same": a.same,
            **({a.witness: a.witnessed} if a.witness else {}),
        }
        for drafter in REAL
        for a in agreement(count if drafter == "random" else max(count // 5, 40), drafter)
    ]


def bits(count: int) -> list[Line]:
    """Row invariance."""
    from tests.lossless.rows import invariance

    return [
        {"part": "row invariance, bits of logits", "arm": i.name, "passed": i.passed, "prefixes": i.compared,
         "different": i.different}
        for i in invariance(count)
    ]  # fmt: skip


def texts(count: int, tokens: int) -> list[Line]:
    """Greedy texts of the embedded model."""
    from tests.lossless.greedy import available, greedy

    part = "greedy, embedded model"
    if not available():
        return [{"part": part, "arm": "engine/demo is not there yet: left out", "passed": True}]
    lines = []
    for g in greedy(count, tokens):
        line: Line = {"part": part, "arm": g.name, "passed": g.passed, "texts": g.texts, "exact": g.exact}
        line |= {"tokens": g.tokens, "drafted tokens kept": g.accepted}
        if g.differences:
            line["gaps"] = [f"text {d.prompt} token {d.position}: {d.gap:.1e}" for d in g.differences]
        lines.append(line)
    return lines


def counterexample() -> list[Line]:
    """The paper's Appendix A, as exact arithmetic."""
    from tests.lossless.appendix import TARGET, causal, probability_of_a, retrospective

    part = "paper's Appendix A: P(A), .70 is right"
    right, wrong = probability_of_a(causal), probability_of_a(retrospective)
    return [
        {"part": part, "arm": "causal schedule", "passed": right == TARGET["A"], "P(A)": float(right)},
        {"part": part, "arm": "retrospective schedule (mutant)", "passed": wrong != TARGET["A"], "P(A)": float(wrong)},
    ]
