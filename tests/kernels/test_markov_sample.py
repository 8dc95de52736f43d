"""The draft heads: equal to their reference and to a plain module, deterministic row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from kernels import draft_head, threads
from kernels.filters import SamplingRows
from kernels.markov_sample import DraftSample, HeadWeights, markov_sample, remember
from kernels.reference import markov_sample as reference

KINDS = ["none", "vanilla", "gated", "rnn"]
R, BLOCK, H, RANK = 9, 7, 24, 16


def make_head(kind: str, vocabulary: int, dtype: torch.dtype = torch.float32) -> HeadWeights:
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    confidence = {"confidence_weight": normal(H if kind == "none" else H + RANK), "confidence_bias": 0.3}
    if kind == "none":
        return HeadWeights(kind="none", confidence_with_markov=False, **confidence)
    extra = {}
    if kind == "gated":
        extra = {"gate_weight": normal(RANK, H + RANK), "gate_bias": normal(RANK)}
    if kind == "rnn":
        extra = {"joint_weight": normal(3 * RANK, 2 * RANK + H), "joint_bias": normal(3 * RANK)}
    w1, w2 = normal(vocabulary, RANK), normal(vocabulary, RANK).to(dtype)
    return HeadWeights(kind=kind, w1=w1, w2=w2, **extra, **confidence)


def make_case(vocabulary: int, seed: int, temperatures: tuple[float, ...] = (0.0, 0.5, 1.0, 1.7)) -> dict:
    choose = np.random.default_rng(seed)
    sampling = SamplingRows.build(
        choose.choice(temperatures, R),
        choose.choice([0, 3, 70], R),
        choose.choice([1, 0.9], R),
        choose.choice([0, 0.05], R),
        choose.integers(-(2**62), 2**62, R).tolist(),
        choose.integers(0, 2, R),
    )
    return {
        "base_logits": torch.from_numpy(choose.normal(0, 2, (R, BLOCK, vocabulary))).float(),
        "hidden": torch.from_numpy(choose.normal(0, 1, (R, BLOCK, H))).float(),
        "anchors": torch.from_numpy(choose.integers(0, vocabulary, R)),
        "sampling": sampling,
        "positions": torch.from_numpy(choose.integers(0, 999, R)),
        "proposals": torch.from_numpy(choose.integers(0, 999, R)),
    }


def take(case: dict, index: torch.Tensor) -> dict:
    return {
        name: value.take(index) if isinstance(value, SamplingRows) else value[index] for name, value in case.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_remembered_beforehand_is_what_would_be_worked_out(dtype: torch.dtype) -> None:
    before, after = make_head("vanilla", 300, dtype), make_head("vanilla", 300, dtype)
    remember(after)
    state = after.packed.memo_state
    assert state[:, 0].tolist()[:300] == list(range(300)) and not state[:, 1].any()
    for seed in range(3):
        case = make_case(300, seed)
        one, other = markov_sample(head=before, **case), markov_sample(head=after, **case)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.log_z, other.log_z)
        assert one.confidence is not None and other.confidence is not None
        assert torch.equal(one.confidence, other.confidence)
    for kind in ("none", "gated"):
        remember(make_head(kind, 300, dtype))  # remembers nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [6, 50, 1025])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_equals_reference(kind: str, vocabulary: int, dtype: torch.dtype) -> None:
    head = make_head(kind, vocabulary, dtype)
    for seed in range(3 if vocabulary < 100 else 1):
        case = make_case(vocabulary, seed)
        fast = markov_sample(head=head, **case)
        tokens, logits, log_z, confidence = reference.markov_sample(head=head, **case)
        assert torch.equal(fast.tokens, tokens)
        torch.testing.assert_close(fast.log_z, log_z, rtol=0, atol=3e-6)
        torch.testing.assert_close(fast.confidence, confidence, rtol=0, atol=1e-6)
        if fast.logits is not None:
            kept = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
            torch.testing.assert_close(fast.logits[kept], logits[kept], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reduced_draft_vocabulary_is_the_whole_one_with_the_rest_ruled_out(kind: str) -> None:
    """Bit for bit what the target's vocabulary gives when every other token's base logit is −inf."""
    vocabulary, ids = 300, torch.randperm(300, generator=torch.Generator().manual_seed(1))[:41]
    whole, case = make_head(kind, vocabulary), make_case(vocabulary, 6)
    few = replace(whole, w2=None if whole.w2 is None else whole.w2[ids], ids=ids, vocabulary=vocabulary)
    outside = torch.ones(vocabulary, dtype=torch.bool).index_fill_(0, ids, False)
    wide = case["base_logits"].clone()
    wide[..., outside] = -torch.inf
    expected = markov_sample(head=whole, **dict(case, base_logits=wide))
    narrow = dict(case, base_logits=case["base_logits"][..., ids])
    kept = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
    assert same(markov_sample(head=few, **narrow), expected, kept)
    assert not outside[expected.tokens].any()
    assert torch.equal(few.widen(narrow["base_logits"]), wide)
    if kind != "none":  # what a device's kernels are given
        assert torch.equal(few.widened.w2[ids], whole.w2[ids]) and not few.widened.w2[outside].any()
        with pytest.raises(ValueError, match="a row of w2 for each id"):
            replace(few, w2=whole.w2)


class PlainHead(nn.Module):
    """The heads as the paper writes them, teacher-forced, one row at a time."""

    def __init__(self, head: HeadWeights) -> None:
        super().__init__()
        self.head = head

    def forward(self, base: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        head, out, s = self.head, [], torch.zeros(RANK)
        for k in range(BLOCK):
            x, h = head.w1[previous[k]], hidden[k]
            if head.kind == "vanilla":
                f = x
            elif head.kind == "gated":
                on_h, on_x = head.gate_weight.split([H, RANK], 1)
                f = torch.sigmoid(on_h @ h + on_x @ x + head.gate_bias) * x
            else:
                on_s, on_x, on_h = head.joint_weight.split([RANK, RANK, H], 1)
                g, c, o = (on_s @ s + on_x @ x + on_h @ h + head.joint_bias).split(RANK)
                s, f = torch.sigmoid(g) * s + (1 - torch.sigmoid(g)) * torch.tanh(c), torch.tanh(o)
            out.append(base[k] + head.w2 @ f)
        return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_logits_are_those_of_the_paper(kind: str) -> None:
    head, case = make_head(kind, 50), make_case(50, 1)
    case["sampling"] = SamplingRows.build([1.0] * R, [0] * R, [1.0] * R, [0.0] * R, list(range(R)), [False] * R)
    draft = markov_sample(head=head, **case)
    assert draft.logits is not None
    for i in range(R):
        previous = torch.cat([case["anchors"][i : i + 1], draft.tokens[i, :-1]])
        logits = PlainHead(head)(case["base_logits"][i], case["hidden"][i], previous)
        expected = logits - logits.amax(-1, keepdim=True)
        torch.testing.assert_close(draft.logits[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draft.log_z[i], expected.logsumexp(-1), rtol=0, atol=1e-5)
        inputs = torch.cat([case["hidden"][i], head.w1[previous]], -1)
        confidence = torch.sigmoid(inputs @ head.confidence_weight + head.confidence_bias)
        torch.testing.assert_close(draft.confidence[i], confidence, rtol=0, atol=1e-6)


def same(a: DraftSample, b: DraftSample, kept: torch.Tensor) -> bool:
    logits = a.logits is None or b.logits is None or torch.equal(a.logits[kept], b.logits[kept])
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.log_z, b.log_z)
        and torch.equal(a.confidence, b.confidence)
        and logits
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_but_itself_bit_for_bit(kind: str) -> None:
    head, case = make_head(kind, 300), make_case(300, 4)
    kept = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
    together = markov_sample(head=head, **case)
    assert same(together, markov_sample(head=head, **case), kept), "remembered biases must not change a bit"
    for i in range(R):
        one = torch.tensor([i])
        alone = markov_sample(head=head, **take(case, one))
        row = DraftSample(*(value if value is None else value[one] for value in together))
        assert same(alone, row, kept[one])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [4, 1024])
def test_threads_change_no_bit(kind: str, slots: int, three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they take remembered biases from each other: few slots, shared by many tokens."""
    monkeypatch.setattr(draft_head, "MEMO_ROWS", slots)
    head = make_head(kind, 300)
    cases = [make_case(300, seed) for seed in range(40)]
    many = [markov_sample(head=head, **case) for case in cases]
    threads.set_threads(1)
    fresh = make_head(kind, 300)
    for case, drafted in zip(cases, many, strict=True):
        kept = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
        assert same(drafted, markov_sample(head=fresh, **case), kept)


def test_what_native_code_would_misread_is_refused() -> None:
    head, case = make_head("vanilla", 50), make_case(50, 2)
    with pytest.raises(ValueError, match="anchors, positions and proposals must be contiguous int64"):
        markov_sample(head=head, **dict(case, positions=case["positions"].int()))
    with pytest.raises(ValueError, match="a row a slot"):
        markov_sample(head=head, **dict(case, hidden=case["hidden"][:, :3]))
    torn = replace(case["sampling"], top_p=case["sampling"].top_p.double())
    with pytest.raises(ValueError, match=r"top_p must be contiguous torch\.float32"):
        markov_sample(head=head, **dict(case, sampling=torn))


def test_confidence_never_reads_its_own_token() -> None:
    head, case = make_head("vanilla", 50), make_case(50, 2, (1.0,))
    other = dict(case, proposals=case["proposals"] + 1)
    first, second = markov_sample(head=head, **case), markov_sample(head=head, **other)
    changed = (first.tokens != second.tokens).int().cumsum(1)
    before = changed - (first.tokens != second.tokens).int() == 0  # every earlier token is the same
    assert (changed > 0).any()
    assert torch.equal(first.confidence[before], second.confidence[before])


@pytest.mark.parametrize("coupled", [False, True])
def test_first_token_has_the_drafters_law(coupled: bool) -> None:
    count = 20_000
    head = HeadWeights("vanilla", torch.eye(6), torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    sampling = SamplingRows.build(
        [0.8] * count, [5] * count, [1.0] * count, [0.0] * count, range(count), [coupled] * count
    )
    zeros = torch.zeros(count, dtype=torch.int64)
    draft = markov_sample(torch.zeros(count, 1, 6), torch.zeros(count, 1, 1), zeros, head, sampling, zeros, zeros)
    assert (draft.logits is None) == coupled
    logits = head.w2[:, 0] / 0.8
    kept = logits > logits.min()
    expected = logits[kept].double().softmax(0).numpy() * count
    seen = torch.bincount(draft.tokens[:, 0], minlength=6)
    assert int(seen[~kept].sum()) == 0
    assert stats.chisquare(seen[kept].numpy(), expected).pvalue > 1e-3


def test_greedy_rows_need_no_logits() -> None:
    head, case = make_head("vanilla", 50), make_case(50, 3, (0.0,))
    draft = markov_sample(head=head, **case)
    assert draft.logits is None
    previous = torch.cat([case["anchors"][:, None], draft.tokens[:, :-1]], 1)
    expected = (case["base_logits"] + head.w1[previous] @ head.w2.T).argmax(-1)
    assert torch.equal(draft.tokens, expected)


def test_broken_logits_still_draft_possible_ids() -> None:
    head, case = make_head("vanilla", 50), make_case(50, 3)
    case["base_logits"][:, 2] = float("nan")
    case["base_logits"][:, 4] = -float("inf")
    draft = markov_sample(head=head, **case)
    assert ((draft.tokens >= 0) & (draft.tokens < 50)).all()
    rejection = (case["sampling"].temperature > 0) & ~case["sampling"].coupled
    assert draft.log_z[rejection][:, [2, 4]].isnan().all()


def test_incomplete_heads_are_refused() -> None:
    w = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="w1 and w2"):
        HeadWeights("vanilla", w1=w)
    with pytest.raises(ValueError, match="gate_weight"):
        HeadWeights("gated", w, w)
    with pytest.raises(ValueError, match="joint_weight"):
        HeadWeights("rnn", w, w)
    with pytest.raises(ValueError, match="no Markov head"):
        HeadWeights("none", confidence_weight=torch.zeros(3))
