"""The compiled decisions against their readable versions, on random rounds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.schedule import native_round, native_sheet
from engine.schedule.calibrate import Affine, Calibration, Entry, SurvivalMap
from engine.schedule.cost import CostTable, LiveCost, Work, work_of
from engine.schedule.lengths import Candidate
from engine.schedule.planner import Planner
from engine.schedule.policies import AdaptiveLengths, LengthPolicy, Round, StaticLengths, make_policy
from engine.schedule.sheet import Blocks, Sheet
from engine.types import (
    DraftBlock,
    EndConditions,
    Phase,
    Request,
    Sampling,
    Sequence,
    Speculation,
    SpeculationMode,
    Verification,
)

torch = pytest.importorskip("torch")
GAMMA = 5
SMOOTH = CostTable(
    verify=((1.0, 1e-3), (8.0, 2e-3), (256.0, 4e-2)),
    request_s=1e-5,
    row_context_s=2e-8,
    draft=((1.0, 5e-4), (64.0, 8e-3)),
    absorb=((1.0, 1e-4), (64.0, 5e-4)),
)
STAIRS = CostTable(verify=tuple((float(x), 1e-3 + 2e-3 * ((x + 3) // 8)) for x in range(1, 200)))
POLICIES = {
    "fixed": {"policy": "fixed", "draft_tokens": 3},
    "threshold": {"policy": "threshold", "confidence_threshold": 0.45},
    "causal": {"policy": "causal"},
    "relayed": {"policy": "relayed"},
    "auto": {"policy": "auto"},
}


def policy_of(name: str) -> LengthPolicy:
    policy = make_policy(EngineConfig(model="m", **POLICIES[name]))  # type: ignore[arg-type]
    assert policy is not None
    return policy


def sequence(generator: random.Random, number: int) -> Sequence:
    mode = generator.choice([SpeculationMode.AUTO] * 4 + [SpeculationMode.FIXED, SpeculationMode.THRESHOLD])
    wish = Speculation(mode, generator.choice([None, 0, 2]), generator.choice([None, 0.6]))
    verification = generator.choice(list(Verification))
    sampling = Sampling(temperature=generator.choice([0.0, 0.7, 1.0]))
    prompt = generator.randrange(2, 2000)
    end = EndConditions(generator.randrange(2, 12))
    request = Request(str(number), (0,) * prompt, end, sampling, wish, priority=generator.choice([-4, 0, 0, 3]))
    made = Sequence(request, 0, verification, [0] * prompt, number, Phase.DECODE)
    made.prompt_length = prompt
    made.kv_length = made.absorbed = prompt - 1
    return made


def readable(
    planner: Planner, blocks: Blocks, policy: LengthPolicy, work: Work, tokens: float, price: float, decay: float
) -> tuple[list[int], object]:
    """What the policy's own Python chooses, from the same survivals."""
    candidates = [
        Candidate(
            blocks.conditional[row].tolist(),
            int(blocks.limits[row]),
            s.request.speculation,
            blocks.survival[row].tolist(),
            float(planner.books.real[s.slot, 0]),
            planner.cost.table.row_context_s * planner.cost.speed * s.kv_length,
            s.verification is Verification.COUPLED or s.request.sampling.temperature == 0,
        )
        for row, s in enumerate(blocks.sequences)
    ]
    choice = policy.choose(candidates, Round(work, planner.cost, tokens, price, decay))
    return choice.lengths, choice.stop


@pytest.mark.parametrize("table", [SMOOTH, STAIRS], ids=["smooth", "stairs"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_lengths_are_those_of_the_readable_policies(name: str, table: CostTable) -> None:
    """60 rounds of 1 to 24 requests of every kind: the same lengths and the same reason to stop."""
    from engine.schedule.finished import STOPS

    generator, noise = random.Random(name), np.random.default_rng(len(name))
    compiled, oracle = policy_of(name), policy_of(name)
    verified = 0
    for turn in range(60):
        planner = Planner(LiveCost(table, 256), GAMMA, True)
        planner.cost.drift[0, 16] = generator.uniform(-0.5, 0.5)
        price, decay = generator.uniform(100, 3000), generator.uniform(0.3, 0.95)
        sequences = [sequence(generator, i) for i in range(generator.randrange(1, 25))]
        forced = StaticLengths(SpeculationMode.FIXED, None, 0.5)
        places = planner.who_drafts(sequences, GAMMA, generator.choice([0, 32]), forced)
        if not places:
            continue
        planner.memory[[4, 7]] = price, decay
        drafting = tuple(sequences[place] for place in places)
        confidence = torch.from_numpy(noise.random((len(drafting), GAMMA)).astype(np.float32))
        block = DraftBlock(drafting, torch.zeros(len(drafting), GAMMA, dtype=torch.int64), confidence, None, None)
        found = planner.lengths(block, compiled)
        blocks = planner._blocks
        assert blocks is not None
        work = Work(
            *(len(sequences), len(sequences), sum(s.kv_length for s in sequences), 0, planner._prefill),
            *(len(drafting), sum(s.kv_length for s in drafting), len(drafting)),
        )
        tokens = float(sum(planner.books.real[s.slot, 0] for s in sequences))
        expected, stop = readable(planner, blocks, oracle, work, tokens, price, decay)
        assert (found, STOPS[blocks.stop]) == (expected, stop), f"round {turn}"
        verified += sum(found)
    assert verified > 50
    assert isinstance(compiled, AdaptiveLengths) or compiled.rule == 0


def test_confidences_are_calibrated_and_corrected_as_the_readable_versions_do() -> None:
    generator = np.random.default_rng(1)
    knots = np.linspace(0, 1, 9)
    values = np.sort(generator.random((GAMMA, 9)), axis=1)
    affine = Affine(generator.uniform(0.5, 2, GAMMA), generator.normal(0, 1, GAMMA))
    affine.slope[-1], affine.offset[-1] = 200.0, 900.0  # e^−offset alone is 0, odds to the 200th infinite
    calibration = Calibration(
        (
            Entry(Verification.REJECTION, (0.9, 1.1), "platt", affine),
            Entry(Verification.COUPLED, (0.0, 2.0), "survival_map", SurvivalMap(knots, values)),
        )
    )
    planner = Planner(LiveCost(SMOOTH, 256), GAMMA, True, calibration=calibration)
    planner.reliability.lines[:] = generator.uniform(0.5, 1.5, planner.reliability.lines.shape)
    picks = random.Random(3)
    sequences = [sequence(picks, i) for i in range(30)]
    policy = StaticLengths(SpeculationMode.FIXED, None, 0.5)
    drafting = tuple(sequences[place] for place in planner.who_drafts(sequences, GAMMA, 0, policy))
    confidence = generator.random((len(drafting), GAMMA)).astype(np.float32)
    confidence[0, :2] = 0.0, 1.0
    tokens = torch.zeros(len(drafting), GAMMA, dtype=torch.int64)
    block = DraftBlock(drafting, tokens, torch.from_numpy(confidence), None, None)
    planner.lengths(block, policy)
    blocks = planner._blocks
    assert blocks is not None and len(drafting) > 10
    calibrated = calibration.apply(block).confidence
    np.testing.assert_allclose(blocks.conditional, calibrated, atol=2e-6)
    bands = planner.books.whole[blocks.slots, 0]
    survival, logits = planner.reliability.correct(blocks.conditional, bands)
    np.testing.assert_allclose(blocks.survival, survival, rtol=1e-9)
    np.testing.assert_allclose(blocks.logits, logits, rtol=1e-9)


def test_a_round_of_blocks_is_told_whole() -> None:
    """Every word of its work is written, over what its memory held."""
    planner = Planner(LiveCost(SMOOTH, 256), GAMMA, True)
    sequences = [sequence(random.Random(4), i) for i in range(3)]
    planner.who_drafts(sequences, GAMMA, 7, StaticLengths(SpeculationMode.FIXED, None, 0.5))
    contexts = [s.kv_length for s in sequences]
    sheet = Sheet.of([s.slot for s in sequences], [1.0] * 3)
    sheet.put(native_sheet.CONTEXT, contexts)
    sheet.work[:] = np.nan
    blocks = Blocks.of(tuple(sequences), GAMMA)
    blocks.slots[:], blocks.contexts[:], blocks.limits[:] = [s.slot for s in sequences], contexts, GAMMA
    confidence = np.full((3, GAMMA), 0.5, np.float32)
    given = planner.desk_at, sheet.address, 3, 7, blocks.address, 3, GAMMA, confidence.ctypes.data
    native_round.survive(*given)
    told = sum(contexts)
    assert work_of(sheet.work) == Work(3, 3, told, 0, 7, 3, told, 3)
