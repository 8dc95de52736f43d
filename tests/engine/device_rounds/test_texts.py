"""Texts of rounds that stay on the device are those of rounds that the host runs, whatever happens around them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

from engine.device_rounds.rounds import DeviceRounds
from engine.engine import Engine
from engine.types import Request, Sampling
from tests.engine import helpers
from tests.engine.checkpoints import save_drafter
from tests.engine.device_rounds.helpers import load, rounds_of
from tests.engine.helpers import GREEDY, Result, collect, coupled, request, run

Drafters = Callable[..., Path]
VOCAB = 96
DEMO = Path(__file__).parents[3] / "engine" / "demo"
POLICIES = ("auto", "relayed", "fixed", "threshold", "plain")


def requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy and seeded requests with prompts and answers of many lengths."""
    generator = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 40))]
        filters = {"top_k": generator.choice((0, 7)), "top_p": generator.choice((1.0, 0.8))}
        sampling = coupled(i, generator.choice((0.7, 1.0)), **filters) if i % 2 else GREEDY
        stop = generator.sample(range(VOCAB), 3 if i % 3 == 0 else 0)
        found.append(request(f"r{i}", prompt, generator.randrange(1, 60), sampling, stop_ids=stop))
    return found


def texts(results: dict[str, Result]) -> dict[str, tuple[list[int], object]]:
    return {name: (result.tokens, result.finish) for name, result in results.items()}


@pytest.fixture(scope="module")
def calm(target_dir: Path) -> dict[str, tuple[list[int], object]]:
    """What plain rounds of the host write."""
    return texts(run(helpers.load(target_dir), requests(24)))


@pytest.mark.parametrize("policy", POLICIES)
def test_texts_are_those_of_the_ordinary_path(
    policy: str, target_dir: Path, drafter_dir: Drafters, calm: dict[str, tuple[list[int], object]]
) -> None:
    engine = load(target_dir, drafter_dir(), policy=policy, max_running=10)
    assert texts(run(engine, requests(24))) == calm
    assert rounds_of(engine).seating.launched > 10


def test_a_drafter_that_is_right_is_believed(embedded: dict[str, Engine]) -> None:
    """The embedded model's own DSpark: texts are equal, and most of them were drafted."""
    prompts = [list(f"def f{i}(a, b):\n".encode()) for i in range(6)]
    todo = [request(str(i), p, 40, GREEDY if i % 2 else coupled(i)) for i, p in enumerate(prompts)]
    expected, found = run(embedded["host"], todo), run(embedded["device"], todo)
    assert texts(found) == texts(expected)
    assert sum(result.drafted_tokens_kept for result in found.values()) > 50


@pytest.fixture(scope="module")
def embedded() -> dict[str, Engine]:
    options = {"max_model_len": 128, "kv_memory": 16 * 2**20, "prefix_cache": False, "dtype": "float32"}
    target, drafter = DEMO / "target", DEMO / "dspark"
    host = helpers.load(target, drafter, policy="plain", **options)
    return {"host": host, "device": load(target, drafter, policy="fixed", **options)}


def test_requests_that_need_the_host_send_everybody_to_the_ordinary_path(
    target_dir: Path, drafter_dir: Drafters, calm: dict[str, tuple[list[int], object]]
) -> None:
    engine, rounds = mixed(target_dir, drafter_dir)
    for one in requests(4):
        engine.submit(one)
    results: dict[str, Result] = {}
    for _ in range(3):
        collect(results, engine.step())
    assert rounds.flying
    for name, more in {
        "penalty": {"sampling": Sampling(temperature=0.0, presence_penalty=0.5)},
        "logprobs": {"logprobs": 2},
        "least": {"min_tokens": 6, "stop_ids": [1, 2]},
    }.items():
        engine.submit(request(name, [5, 6, 7], 6, **more))
        while name not in results or results[name].finish is None:
            collect(results, engine.step())
            engine.check()
            decodes = any(s.request.request_id == name and s.output_length > 1 for s in engine.running)
            assert not (decodes and rounds.flying), "whoever needs the host has it from its second token on"
        collect(results, engine.step())
        assert rounds.flying, "the others go on as before"
    while engine.has_work:
        collect(results, engine.step())
        engine.check()
    assert {name: value for name, value in texts(results).items() if name.startswith("r")} == {
        f"r{i}": calm[f"r{i}"] for i in range(4)
    }


def mixed(target_dir: Path, drafter_dir: Drafters) -> tuple[Engine, DeviceRounds]:
    engine = load(target_dir, drafter_dir(), policy="relayed")
    return engine, rounds_of(engine)


def test_the_policy_changes_in_flight(
    target_dir: Path, drafter_dir: Drafters, calm: dict[str, tuple[list[int], object]]
) -> None:
    """Every policy in turn, `causal` among them, which needs the host."""
    engine, _ = mixed(target_dir, drafter_dir)
    results: dict[str, Result] = {}
    for one in requests(12):
        engine.submit(one)
    policies = [*POLICIES, "causal"]
    for step in range(10_000):
        if not engine.has_work:
            break
        if step % 4 == 3:
            engine.update_policy({"policy": policies[step // 4 % len(policies)]})
        collect(results, engine.step())
        engine.check()
    assert texts(results) == {f"r{i}": calm[f"r{i}"] for i in range(12)}


@pytest.mark.parametrize(
    "draft", [{"head": "gated"}, {"head": "none", "confidence": False}, {"changes": {"sample_from_anchor": False}}]
)
def test_every_kind_of_block_drafter(
    draft: dict[str, object],
    target_dir: Path,
    drafter_dir: Drafters,
    calm: dict[str, tuple[list[int], object]],
    hf_target: Qwen3ForCausalLM,
    tmp_path: Path,
) -> None:
    directory = save_drafter(tmp_path, hf_target, **draft)
    engine = load(target_dir, directory, policy="relayed")
    found = texts(run(engine, requests(24)))
    assert found == calm
    assert sum(record.verified for record in engine.history.last()) > 20


def test_without_a_drafter_rounds_stay_on_the_device_too(
    target_dir: Path, calm: dict[str, tuple[list[int], object]]
) -> None:
    engine = load(target_dir, max_running=3)
    assert texts(run(engine, requests(24))) == calm
    assert rounds_of(engine).seating.launched > 20


def test_prefixes_that_the_device_wrote_are_found_again(target_dir: Path, drafter_dir: Drafters) -> None:
    """What a device round left in both caches serves another request, which drafts from it."""
    engine = load(target_dir, drafter_dir(), policy="fixed")
    first = request("a", [3, 1, 4, 1, 5], 60, coupled(1))
    text = run(engine, [first])["a"].tokens
    second = request("b", [3, 1, 4, 1, 5, *text], 30, coupled(2))
    found = run(engine, [second])["b"]
    assert found.cached == 64
    again = helpers.load(target_dir, drafter_dir(), policy="fixed", prefix_cache=False)
    assert found.tokens == run(again, [second])["b"].tokens
    ordinary = helpers.load(target_dir, drafter_dir(), policy="fixed")
    run(ordinary, [first])
    expected = run(ordinary, [second])["b"]
    assert [(d.verified, d.accepted) for d in found.deltas if d.tokens][1:] == [
        (d.verified, d.accepted) for d in expected.deltas if d.tokens
    ][1:], "the drafter's context is another"
