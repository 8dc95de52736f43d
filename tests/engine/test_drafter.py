"""The drafter's logits, tokens and confidences equal the paper's equations, wherever the context came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.engine import Engine
from engine.types import DraftBlock, Sampling, Sequence, SpeculationMode, Verification
from kernels.noise import Purpose, exponential_rows, uniforms
from tests.engine.checkpoints import HEADS
from tests.engine.helpers import FIXED, GREEDY, OFF, PAGE_BYTES, load, rejection, request, run
from tests.engine.lookahead import LookAheadOracle
from tests.engine.oracle import Oracle

Drafters = Callable[..., Path]


class Judge:
    """Compares every `every`-th block that an engine proposes with the oracle, sequence by sequence."""

    def __init__(self, engine: Engine, oracle: Oracle | LookAheadOracle, every: int = 1) -> None:
        assert engine.drafter is not None
        self.oracle = oracle
        self.every = every
        self.proposals = 0
        self.judged = 0
        self.positions: set[int] = set()
        self._propose = engine.drafter.propose
        engine.drafter.propose = self  # type: ignore[assignment,method-assign]

    def __call__(self, sequences: tuple[Sequence, ...], length: int | None = None) -> DraftBlock:
        block = self._propose(sequences, length)
        self.proposals += 1
        if self.proposals % self.every == 0:
            deepest = max(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
            row = deepest if self.proposals % 3 == 0 else self.proposals % len(sequences)
            self.judge(sequences[row], block, row)
        return block

    def judge(self, sequence: Sequence, block: DraftBlock, row: int) -> None:
        truth = self.oracle.block(sequence.tokens)
        previous, state = sequence.anchor, None
        for k in range(self.drafted(sequence, block)):
            logits, confidence, state = self.oracle.step(truth, k, previous, state)
            drawn = int(block.tokens[row, k])
            assert drawn == self._draw(sequence, block, row, k, logits), (sequence.request.request_id, k)
            if confidence is not None:
                assert block.confidence is not None
                assert float(block.confidence[row, k]) == pytest.approx(confidence, abs=1e-4)
            previous = drawn
        self.judged += 1
        self.positions.add(len(sequence.tokens) - 1)

    def drafted(self, sequence: Sequence, block: DraftBlock) -> int:
        """Tokens that the block holds; the rest is padding."""
        return int(block.tokens.shape[1])

    def _draw(self, sequence: Sequence, block: DraftBlock, row: int, k: int, logits: torch.Tensor) -> int:
        """The token that these logits and the request's noise give; p_d is compared on the way."""
        temperature = sequence.request.sampling.temperature
        if temperature == 0:
            return int(logits.argmax())
        probability = (logits.double() / temperature).softmax(-1)
        seed = torch.tensor([sequence.seed - (1 << 64) if sequence.seed >> 63 else sequence.seed])
        position = torch.tensor([len(sequence.tokens) + k])
        if sequence.verification is Verification.COUPLED:
            noise = exponential_rows(seed, position, Purpose.COUPLED, len(logits))[0]
            return int((probability.log() - noise.double().log()).argmax())
        assert block.logits is not None
        assert block.log_z is not None
        claimed = (block.logits[row, k] - block.log_z[row, k]).double().exp()
        torch.testing.assert_close(claimed, probability, rtol=0, atol=1e-4)
        u = float(uniforms(seed, position, torch.tensor([sequence.proposals]), Purpose.DRAFT)[0])
        return int((probability.cumsum(-1) <= u).sum())


MIX = (
    (GREEDY, FIXED),
    (Sampling(temperature=1.0, seed=5), FIXED),
    (Sampling(temperature=0.7, seed=2**64 - 3), rejection()),
    (GREEDY, OFF),
    (Sampling(temperature=1.3, seed=77), rejection(SpeculationMode.THRESHOLD, confidence_threshold=0.5)),
)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_markov", [True, False], ids=["markov confidence", "plain confidence"])
def test_every_head(
    head: str,
    with_markov: bool,
    hf_target: Qwen3ForCausalLM,
    target_dir: Path,
    drafter_dir: Drafters,
    prompts: list[tuple[int, ...]],
) -> None:
    """A mixed batch: greedy, coupled and rejection rows, prompts of many lengths in chunks, some sitting out."""
    directory = drafter_dir(head=head, with_markov=with_markov)
    engine = load(target_dir, directory, policy="fixed", prefill_chunk=11)
    assert (engine.info.drafter, engine.info.head, engine.info.has_confidence) == ("dspark", head, True)
    judge = Judge(engine, Oracle(directory, hf_target))
    run(engine, [request(str(i), p, 10, *MIX[i % len(MIX)]) for i, p in enumerate(prompts)])
    assert judge.judged >= 8
    assert max(judge.positions) > 64


def test_dflash_has_no_heads(
    hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters, prompts: list[tuple[int, ...]]
) -> None:
    directory = drafter_dir(head="none", confidence=False, block=4, layers=3, feature_layers=(-1, 1, 2))
    engine = load(target_dir, directory, policy="threshold")
    assert (engine.info.drafter, engine.info.block_size, engine.info.has_confidence) == ("dflash", 4, False)
    judge = Judge(engine, Oracle(directory, hf_target))
    results = run(engine, [request(str(i), p, 6, MIX[i][0]) for i, p in enumerate(prompts[:3])])
    assert judge.judged >= 3
    assert any(delta.verified for delta in results["0"].deltas), "without confidences all of a block is verified"


FEW_IDS = (3, 90, 0, 41, 42, 7, 66, 12, 95, 30, 31, 55, 54, 20, 77, 81)  # no order: d2t need not increase


@pytest.mark.parametrize("head", HEADS)
def test_a_reduced_draft_vocabulary(
    head: str, hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters, prompts: list[tuple[int, ...]]
) -> None:
    """W1 by target ids, W2 and lm_head by draft ids; tokens outside have no chance, and noise goes by target id."""
    directory = drafter_dir(head=head, draft_ids=FEW_IDS, own_head=head in ("none", "rnn"))
    engine = load(target_dir, directory, policy="fixed")
    judge = Judge(engine, Oracle(directory, hf_target))
    results = run(engine, [request(str(i), p, 10, *MIX[i % len(MIX)]) for i, p in enumerate(prompts)])
    assert judge.judged >= 8
    plain = run(load(target_dir), [request(str(i), p, 10, *MIX[i % len(MIX)]) for i, p in enumerate(prompts)])
    for i in range(len(prompts)):
        if i % len(MIX) in (0, 1, 3):  # greedy and coupled: the text is the target's own
            assert results[str(i)].tokens == plain[str(i)].tokens


def test_copies_of_the_targets_tensors_are_welcome(target_dir: Path, drafter_dir: Drafters) -> None:
    assert load(target_dir, drafter_dir(copies=True)).info.drafter == "dspark"


def test_long_context(hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters) -> None:
    """A rope or position error by one would show here first."""
    directory = drafter_dir()
    engine = load(target_dir, directory, policy="fixed", max_model_len=512, prefill_chunk=37, kv_memory=8 * 2**20)
    judge = Judge(engine, Oracle(directory, hf_target), every=3)
    prompt = torch.randint(96, (440,), generator=torch.Generator().manual_seed(4)).tolist()
    run(engine, [request("long", prompt, 50, Sampling(seed=1)), request("short", prompt[:3], 8, Sampling(seed=2))])
    assert judge.judged >= 5
    assert max(judge.positions) > 470


def test_after_prefix_cache_hits(hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters) -> None:
    """Cached pages hold the drafter's context too, generated ones included."""
    directory = drafter_dir()
    engine = load(target_dir, directory, policy="fixed")
    prompt = torch.randint(96, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    first = run(engine, [request("first", prompt, 30, Sampling(seed=3))])["first"]
    judge = Judge(engine, Oracle(directory, hf_target))
    again = [*prompt, *first.tokens, 5, 6]
    results = run(
        engine, [request("second", again, 8, Sampling(seed=4)), request("third", again[:35], 8, Sampling(seed=5))]
    )
    assert results["second"].cached == 64
    assert results["third"].cached == 32
    assert judge.judged >= 4


def test_after_preemption(
    hf_target: Qwen3ForCausalLM, target_dir: Path, drafter_dir: Drafters, prompts: list[tuple[int, ...]]
) -> None:
    directory = drafter_dir()
    engine = load(target_dir, directory, policy="fixed", kv_memory=14 * PAGE_BYTES, max_model_len=96)
    judge = Judge(engine, Oracle(directory, hf_target), every=2)
    preempted: set[str] = set()
    propose = engine.scheduler.choose_drafting

    def watch(running: list[Sequence], waiting: list[Sequence]) -> tuple[Sequence, ...]:
        preempted.update(s.request.request_id for s in running if s.preemptions)
        return propose(running, waiting)

    engine.scheduler.choose_drafting = watch  # type: ignore[method-assign]
    run(engine, [request(str(i), p, 24, *MIX[i % 3]) for i, p in enumerate(prompts)])
    assert preempted, "the pool was meant to run out"
    assert judge.judged >= 8


def test_a_hole_in_the_context_is_noticed(target_dir: Path, drafter_dir: Drafters) -> None:
    engine = load(target_dir, drafter_dir(), policy="fixed")
    engine.submit(request("a", range(20), 10))
    engine.step()
    engine.running[0].absorbed -= 1
    with pytest.raises(AssertionError, match="holes"):
        engine.step()
