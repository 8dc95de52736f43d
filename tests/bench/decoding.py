"""The engine alone: plain decoding beside transformers, DSpark beside plain, long context beside short."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from engine.batch import build_batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import learn_costs, load_engine, warm_up
from engine.types import EndConditions, PlanRow, Request, Sampling, StepPlan, TokenDelta, Verification
from engine.types import Sequence as State
from tests.bench.measure import EMBEDDED, Subject, emit, interleave, median, repeated_share, say, seconds

TARGET = EMBEDDED.target


def make_engine(policy: str, threads: int, subject: Subject = EMBEDDED, prefix_cache: bool = False) -> Engine:
    """ "plain" loads no drafter, any other policy DSpark's; "alone" is auto without lookup."""
    draft = "none" if policy == "plain" else str(subject.drafter("dspark"))
    engine = load_engine(
        EngineConfig(
            model=str(subject.target),
            draft=draft,
            threads=threads,
            prefix_cache=prefix_cache,
            policy="auto" if policy == "alone" else policy,
            lookup=policy != "alone",
        )
    )
    warm_up(engine)
    if policy != "plain":
        learn_costs(engine, 5.0)
    return engine


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, seed: int = 0
) -> tuple[list[list[int]], list[TokenDelta]]:
    """Run prompts together until all have `max_tokens` tokens."""
    outputs: list[list[int]] = [[] for _ in prompts]
    deltas = []
    for index, prompt in enumerate(prompts):
        sampling = Sampling(temperature=temperature)
        engine.submit(Request(f"{seed}-{index}", tuple(prompt), EndConditions(max_tokens), sampling))
    while engine.has_work:
        for delta in engine.step():
            outputs[int(delta.request_id.split("-")[1])] += delta.tokens
            deltas.append(delta)
    return outputs, deltas


def beside_transformers(threads: int, repeats: int) -> None:
    """Greedy plain decoding, 1 and 8 requests, against transformers on the same weights and threads."""
    peer = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    engine = make_engine("plain", threads)
    torch.set_num_threads(threads)  # transformers'; the engine's loading set its own
    prompts = [p[-64:] for p in EMBEDDED.encode(EMBEDDED.heldout("code")) if len(p) >= 64][:8]
    tokens = 96

    def theirs(count: int) -> float:
        if count == 1:
            ids = torch.tensor(prompts[:1])
            took = seconds(lambda: peer.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False))
        else:
            took = seconds(lambda: _continuous_batching(peer, prompts[:count], tokens))
        return count * tokens / took

    def ours(count: int) -> float:
        return count * tokens / seconds(lambda: generate(engine, prompts[:count], tokens, 0.0))

    for count in (1, 8):
        say(f"plain decoding, {count} request(s), ours and transformers")
        ours(count), theirs(count)
        results = interleave({"ours": lambda c=count: ours(c), "theirs": lambda c=count: theirs(c)}, repeats)  # type: ignore[misc]
        emit(
            name="plain_vs_transformers",
            requests=count,
            threads=threads,
            tokens_per_s=median(results["ours"]),
            transformers_tokens_per_s=median(results["theirs"]),
            peer="generate" if count == 1 else "generate_batch (continuous batching)",
            ratio=median(results["ours"]) / median(results["theirs"]),
        )


def _continuous_batching(peer: torch.nn.Module, prompts: list[list[int]], tokens: int) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = peer.generate_batch(inputs=prompts, generation_config=config)  # type: ignore[operator]
    short = [len(o.generated_tokens) for o in outputs.values() if len(o.generated_tokens) < tokens]
    assert len(outputs) == len(prompts) and not short, (
        f"transformers returned {len(outputs)} outputs, short ones {short}"
    )


ARMS = ("plain", "auto", "alone", "threshold", "fixed")


@dataclass(frozen=True, slots=True)
class Decoded:
    """One prompt decoded by one arm."""

    tokens_per_s: float
    accepted_length: float
    verified: float  # draft tokens a round
    repeated: float
    same: bool  # as plain decoding


def compare(engines: dict[str, Engine], prompt: Sequence[int], tokens: int, temperature: float) -> dict[str, Decoded]:
    """Decode one prompt three times with every engine, interleaved."""
    found: dict[str, tuple[list[list[int]], list[TokenDelta]]] = {}

    def speed(name: str) -> float:
        start = time.perf_counter()
        found[name] = generate(engines[name], [prompt], tokens, temperature)
        return tokens / (time.perf_counter() - start)

    speeds = interleave({name: partial(speed, name) for name in engines}, 3)
    decoded = {}
    for name, (texts, deltas) in found.items():
        rounds = [delta for delta in deltas if delta.decode_round]
        decoded[name] = Decoded(
            tokens_per_s=median(speeds[name]),
            accepted_length=sum(len(delta.tokens) for delta in rounds) / len(rounds),
            verified=sum(delta.verified for delta in rounds) / len(rounds),
            repeated=repeated_share(texts[0]),
            same=texts == found["plain"][0],
        )
    return decoded


def beside_plain(
    threads: int,
    limit: int,
    domains: Sequence[str],
    subject: Subject = EMBEDDED,
    temperatures: Sequence[float] = (0, 1),
) -> None:
    """DSpark under its policies against our own plain decoding, one request at a time, on held-out prompts.

    Raises:
        SystemExit: the subject has no DSpark drafter, or no prompts of a domain.
    """
    if subject.drafter("dspark") is None:
        raise SystemExit(f"{subject.drafters} holds no dspark; give --drafters")
    found = subject.by_domain()
    if unknown := [domain for domain in domains if domain not in found]:
        raise SystemExit(f"--domains: {subject.prompts} has none of {unknown[0]!r}; it has {', '.join(found)}")
    engines = {policy: make_engine(policy, threads, subject) for policy in ARMS}
    for domain, temperature in ((domain, temperature) for domain in domains for temperature in temperatures):
        prompts, tokens = [prompt[-256:] for prompt in subject.encode(found[domain][:limit])], 128
        say(f"DSpark beside plain, {domain}, temperature {temperature}, {len(prompts)} prompts")
        for engine in engines.values():
            generate(engine, prompts[:1], tokens, temperature)
        rows = [compare(engines, prompt, tokens, temperature) for prompt in prompts]
        fresh = [row for row in rows if row["plain"].repeated < 0.1]
        for arm in ARMS[1:]:
            _emit_compared(rows, "all", arm, domain, temperature, threads)
            if fresh and temperature == 0:
                _emit_compared(fresh, "under 10 % repeated", arm, domain, temperature, threads)


def _emit_compared(
    rows: Sequence[dict[str, Decoded]], which: str, arm: str, domain: str, temperature: float, threads: int
) -> None:
    chosen = [row[arm] for row in rows]
    slow = median([row["plain"].tokens_per_s for row in rows])
    fast = median([row.tokens_per_s for row in chosen])
    emit(
        name="dspark_vs_plain",
        policy=arm,
        domain=domain,
        temperature=temperature,
        which=which,
        prompts=len(rows),
        threads=threads,
        plain_tokens_per_s=slow,
        dspark_tokens_per_s=fast,
        ratio=fast / slow,
        mean_accepted_length=sum(r.accepted_length for r in chosen) / len(rows),
        mean_verified=sum(r.verified for r in chosen) / len(rows),
        repeated_16gram_share=sum(r.repeated for r in chosen) / len(rows),
        same_text_share=sum(r.same for r in chosen) / len(rows) if temperature == 0 else None,
    )


def long_context(threads: int, repeats: int) -> None:
    """Milliseconds a plain token at 2,000 tokens of context and at 100."""
    engine = make_engine("plain", threads)
    text = [token for prompt in EMBEDDED.encode(EMBEDDED.heldout("code")) for token in prompt]

    def cost(length: int) -> float:
        engine.submit(Request("long", tuple(text[:length]), EndConditions(64), Sampling(temperature=0.0)))
        while not engine.running or engine.running[0].phase.value != "decode":
            engine.step()

        def decode() -> None:
            while engine.has_work:
                engine.step()

        return seconds(decode) / 63 * 1e3

    say("decode cost by context")
    cost(100), cost(2000)
    results = interleave({"100": lambda: cost(100), "2000": lambda: cost(2000)}, repeats)
    short, long = median(results["100"]), median(results["2000"])
    emit(name="context_cost", threads=threads, ms_at_100=short, ms_at_2000=long, ratio=long / short)


def cost_by_rows(threads: int, repeats: int) -> None:
    """Milliseconds of one target forward (layers and head) over 1 to 8 rows at 100 tokens of context."""
    target = make_engine("plain", threads).target
    tokens = [token for prompt in EMBEDDED.encode(EMBEDDED.heldout("code")) for token in prompt][:128]
    request = Request("rows", tuple(tokens), EndConditions(1))
    pages = array("q", range(len(tokens) // 16))
    sequence = State(request, 0, Verification.COUPLED, tokens, 0, pages=pages, prompt_length=len(tokens))

    def forward(rows: int) -> float:
        batch = build_batch(StepPlan((PlanRow(sequence, 100, rows),)), None, target.device)
        batch = batch._replace(logit_rows=batch.positions - 100)
        return seconds(lambda: target.forward(batch, ())) * 1e3

    say("target forward by rows")
    arms = {str(rows): partial(forward, rows) for rows in (1, 2, 3, 4, 6, 8)}
    results = interleave(arms, 30 * repeats)
    emit(name="forward_by_rows", threads=threads, **{f"ms_{rows}": median(times) for rows, times in results.items()})
