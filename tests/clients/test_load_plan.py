"""The load generator's plan: arrival times, mixes, traces."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clients.events import Chat
from clients.load.arrivals import Mixes, TraceEntry, make_plan, random_times, read_trace
from clients.load.prompts import BUILT_IN, PromptMix, WorkloadError, parse_mix, read_prompts

TOKENS = tuple(range(100, 150))
PROMPTS = PromptMix(("a", "b"), (3.0, 1.0), TOKENS)
MIXES = Mixes(prompts=PROMPTS, prompt_tokens=None, max_tokens=parse_mix("8:1,20-30:1"))


def gaps(burstiness: float, count: int = 20_000) -> np.ndarray:
    times = list(itertools.islice(random_times(4.0, burstiness, seed=5), count))
    return np.diff([0.0, *times])


def test_arrivals_are_a_poisson_process() -> None:
    drawn = gaps(1.0)
    assert stats.kstest(drawn, stats.expon(scale=1 / 4).cdf).pvalue > 0.001
    a_second = np.histogram(np.cumsum(drawn), bins=np.arange(0, 4900))[0]
    assert a_second.var() / a_second.mean() == pytest.approx(1.0, abs=0.1)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 2.0])
def test_burstiness_is_the_gaps_coefficient_of_variation(burstiness: float) -> None:
    drawn = gaps(burstiness)
    assert drawn.mean() == pytest.approx(1 / 4, rel=0.05)
    assert drawn.std() / drawn.mean() == pytest.approx(burstiness, rel=0.06, abs=1e-9)


def test_mixes() -> None:
    mix, rng = parse_mix("64:3,256-512"), random.Random(0)
    drawn = [mix.draw(rng) for _ in range(4000)]
    assert sum(length == 64 for length in drawn) / 4000 == pytest.approx(0.75, abs=0.04)
    others = [length for length in drawn if length != 64]
    assert min(others) >= 256 and max(others) <= 512 and len(set(others)) > 200


@pytest.mark.parametrize("text", ["", "x", "5-", "-5", "0", "9-3", "4:0", "4:-1", "4:nan", "4:inf", "4,,5"])
def test_a_wrong_mix_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError):
        parse_mix(text)


def test_the_seed_fixes_the_plan_and_choices_do_not_disturb_each_other() -> None:
    entries = [TraceEntry(float(i)) for i in range(2000)]
    plan = make_plan(entries, MIXES, seed=1)
    assert plan == make_plan(entries, MIXES, seed=1) != make_plan(entries, MIXES, seed=2)
    hanging_up = Mixes(prompts=PROMPTS, prompt_tokens=None, max_tokens=MIXES.max_tokens, cancel_share=0.25)
    other = make_plan(entries, hanging_up, seed=1)
    assert [(a.prompt, a.max_tokens) for a in other] == [(a.prompt, a.max_tokens) for a in plan]
    parts = [(a.cancel_after_tokens, a.max_tokens) for a in other if a.cancel_after_tokens is not None]
    assert len(parts) / 2000 == pytest.approx(0.25, abs=0.04)
    assert all(1 <= after < most for after, most in parts)
    assert np.mean([after / most for after, most in parts]) == pytest.approx(0.5, abs=0.05)
    assert sum(a.prompt == "a" for a in plan) / 2000 == pytest.approx(0.75, abs=0.04)


def test_prompts_of_a_length_are_cut_from_the_prompts_own_tokens() -> None:
    mixes = Mixes(prompts=PROMPTS, prompt_tokens=parse_mix("120"), max_tokens=MIXES.max_tokens)
    for arrival in make_plan([TraceEntry(0.0)] * 20, mixes, seed=1):
        assert isinstance(arrival.prompt, list) and len(arrival.prompt) == 120
        start = TOKENS.index(arrival.prompt[0])
        assert arrival.prompt == [TOKENS[(start + i) % len(TOKENS)] for i in range(120)]


def test_a_trace_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at_s": 12.5, "prompt": "hi", "max_tokens": 3, "cancel_after_tokens": 2}\n\n'
        '{"at_s": 10, "prompt_tokens": 7}\n'
        '{"at_s": 11, "messages": [{"role": "user", "content": "hello"}]}\n'
    )
    first, second, third = make_plan(read_trace(path), MIXES, seed=0)
    assert [first.at_s, second.at_s, third.at_s] == [0.0, 1.0, 2.5]
    assert isinstance(first.prompt, list) and len(first.prompt) == 7
    assert isinstance(second.prompt, Chat) and second.prompt.messages[0].content == "hello"
    assert (third.prompt, third.max_tokens, third.cancel_after_tokens) == ("hi", 3, 2)


def test_a_trace_in_azures_columns(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.2299600,9,5\n"
    )
    first, second = read_trace(path)
    assert (first.at_s, first.prompt_tokens, first.max_tokens) == (0.0, 374, 44)
    assert (second.at_s, second.prompt_tokens, second.max_tokens) == (pytest.approx(0.25), 9, 5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"prompt": "x"}', "at_s"),
        ('{"at_s": "soon"}', "at_s"),
        ('{"at_s": NaN}', "at_s"),
        ('{"at_s": 1, "max_tokens": 0}', "max_tokens"),
        ('{"at_s": 1, "cancel_after_tokens": 1.5}', "cancel_after_tokens"),
        ('{"at_s": 1, "prompt": "x", "prompt_tokens": 4}', "prompt_tokens"),
        ('{"at_s": 1, "prompt": 5}', "prompt"),
        ('{"at_s": 1, "messages": [{"role": "user"}]}', "messages"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at_s": 1}\n' + line + "\n")
    with pytest.raises(WorkloadError, match=r"trace\.jsonl:2: .*" + complaint):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("A,B\n1,2\n", ":1: needs the columns"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,-1\n", "GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=complaint):
        read_trace(path)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "weight": 2.5, "domain": "code"}\n{"prompt": "y"}\n')
    mix = read_prompts(path)
    assert (mix.prompts, mix.weights) == (("x", "y"), (2.5, 1.0))
    path.write_text('{"prompt": "x", "weight": -1}\n')
    with pytest.raises(WorkloadError, match="weight"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(WorkloadError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(WorkloadError, match="missing"):
        read_prompts(tmp_path / "missing.jsonl")
    assert len(set(BUILT_IN.prompts)) == len(BUILT_IN.weights)
