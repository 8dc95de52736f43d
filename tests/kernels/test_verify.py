"""Verification: equal to its reference, lossless as a law, robust at the edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from kernels import threads
from kernels.filters import SamplingRows, filter_logits_
from kernels.markov_sample import HeadWeights, markov_sample
from kernels.reference import verify as reference
from kernels.verify import verify, verify_arrays

INF = float("inf")
V, COUNT = 5, 20_000


def options(count: int, *, coupled: bool, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingRows:
    seeds = (np.arange(count, dtype=np.int64) * 1_000_003 + seed).tolist()
    return SamplingRows.build(
        [temperature] * count, [top_k] * count, [top_p] * count, [min_p] * count, seeds, [coupled] * count
    )


def full(count: int, value: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int64)


# --- the law of three tokens under a target and a drafter that both look at the token before -----------------------


class Chain:
    """Target: logits[previous token]; drafter: a vanilla head over other logits."""

    def __init__(self, spread: float) -> None:
        generator = torch.Generator().manual_seed(3)
        self.target = torch.randn(V, V, generator=generator) * 1.5
        self.head = HeadWeights(
            "vanilla", torch.eye(V), self.target.T + torch.randn(V, V, generator=generator) * spread
        )

    def rows(self, anchors: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
        return self.target[torch.cat([anchors[:, None], drafted], 1)].reshape(-1, V)

    def law(self, sampling: SamplingRows) -> np.ndarray:
        """P(x1, x2, x3) after token 0."""
        table = self.target.clone()
        log_z = filter_logits_(table, sampling.take(torch.zeros(V, dtype=torch.int64)))
        p = (table - log_z[:, None]).double().exp().numpy()
        return p[0][:, None, None] * p[:, :, None] * p[None, :, :]

    def plain(self, sampling: SamplingRows, tokens: torch.Tensor, position: int, proposal: int) -> torch.Tensor:
        count = len(tokens)
        none = torch.zeros((count, 0), dtype=torch.int64)
        _, chosen, failed = verify(
            self.rows(tokens, none),
            torch.arange(count + 1),
            none,
            full(count, 0),
            None,
            None,
            full(count, -1),
            sampling,
            full(count, position),
            full(count, proposal),
        )
        assert not failed.any()
        return chosen

    def speculate(
        self, sampling: SamplingRows, lengths: torch.Tensor, position: int = 40, guessed: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Three tokens after token 0 at `position`: one verified draft, the rest by plain decoding.

        Args:
            guessed: the same draft, but nobody says what it was drawn from.
        """
        count, block = len(lengths), 3
        draft = markov_sample(
            torch.zeros(count, block, V),
            torch.zeros(count, block, 1),
            full(count, 0),
            self.head,
            sampling,
            full(count, position),
            full(count, 1),
        )
        offsets = torch.zeros(count + 1, dtype=torch.int64)
        offsets[1:] = (lengths + 1).cumsum(0)
        every = self.rows(full(count, 0), draft.tokens)
        used = (torch.arange(block + 1) <= lengths[:, None]).flatten()
        accepted, chosen, failed = verify(
            every[used],
            offsets,
            draft.tokens,
            lengths,
            draft.logits[:0] if guessed else draft.logits,
            draft.log_z[:0] if guessed else draft.log_z,
            torch.arange(count),
            sampling,
            full(count, position + 1),
            full(count, 1),
        )
        assert not failed.any()
        text = torch.cat([draft.tokens, full(count, 0)[:, None]], 1)
        text[torch.arange(count), accepted] = chosen
        for k in range(1, block):
            later = accepted < k
            drawn = self.plain(sampling, text[:, k - 1], position + 1 + k, 2 + k)
            text[later, k] = drawn[later]
        return text[:, :block], accepted, draft.tokens


def chi_square(text: torch.Tensor, law: np.ndarray) -> float:
    cells = np.zeros(law.shape)
    np.add.at(cells, tuple(text.numpy().T), 1)
    expected = law * len(text)
    possible = expected > 0
    assert cells[~possible].sum() == 0, "an impossible token"
    common = expected[possible] >= 5
    seen = np.append(cells[possible][common], cells[possible][~common].sum())
    wanted = np.append(expected[possible][common], expected[possible][~common].sum())
    keep = wanted > 0
    return float(stats.chisquare(seen[keep], wanted[keep] * seen[keep].sum() / wanted[keep].sum()).pvalue)


FILTERS = [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.7}]


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_output_has_the_targets_law_under_any_schedule(coupled: bool, filters: dict, spread: float) -> None:
    chain = Chain(spread)
    sampling = options(COUNT, coupled=coupled, seed=8, **filters)
    lengths = torch.randint(0, 4, (COUNT,), generator=torch.Generator().manual_seed(1))
    text, accepted, _ = chain.speculate(sampling, lengths)
    assert (accepted <= lengths).all()
    assert chi_square(text, chain.law(sampling)) > 1e-3


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_output_has_the_targets_law_whatever_is_guessed(filters: dict) -> None:
    chain = Chain(2.0)
    sampling = options(COUNT, coupled=False, seed=5, **filters)
    lengths = torch.randint(0, 4, (COUNT,), generator=torch.Generator().manual_seed(1))
    text, accepted, drafted = chain.speculate(sampling, lengths, guessed=True)
    assert chi_square(text, chain.law(sampling)) > 1e-3
    law = chain.law(sampling).sum((1, 2))
    usual = int(drafted[:, 0].mode().values)  # a guess is kept with its own probability
    first = (lengths > 0) & (drafted[:, 0] == usual)
    share, wanted = float((accepted[first] > 0).float().mean()), float(law[usual])
    assert abs(share - wanted) < 4 * (0.25 / int(first.sum())) ** 0.5


def test_rejection_accepts_with_the_overlap_of_the_two_laws() -> None:
    chain = Chain(1.0)
    sampling = options(COUNT, coupled=False)
    _, accepted, _ = chain.speculate(sampling, full(COUNT, 3))
    p_target, p_draft = chain.target[0].softmax(0), chain.head.w2[:, 0].softmax(0)
    overlap = float(torch.minimum(p_target, p_draft).sum())
    assert abs(float((accepted > 0).float().mean()) - overlap) < 4 * (0.25 / COUNT) ** 0.5


def test_a_coupled_seed_gives_the_text_of_plain_decoding_whatever_is_drafted() -> None:
    plain = None
    for spread, seed in itertools.product([0.0, 0.5, 3.0], range(2)):
        chain = Chain(spread)
        sampling = options(1000, coupled=True, top_p=0.95)
        lengths = torch.randint(0, 4, (1000,), generator=torch.Generator().manual_seed(seed))
        text, _, _ = chain.speculate(sampling, lengths)
        if plain is None:
            plain, _, _ = chain.speculate(sampling, full(1000, 0))
        assert torch.equal(text, plain)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_drafter_equal_to_the_target_is_always_right(coupled: bool) -> None:
    chain = Chain(0.0)
    _, accepted, _ = chain.speculate(options(COUNT, coupled=coupled), full(COUNT, 3))
    assert (accepted == 3).all()


# --- both implementations agree --------------------------------------------------------------------------------------


def random_case(count: int, vocabulary: int, generator: np.random.Generator) -> list:
    block = 4
    lengths = torch.from_numpy(generator.integers(0, block + 1, count))
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    offsets[1:] = (lengths + 1).cumsum(0)
    logits = torch.from_numpy(generator.normal(0, 3, (int(offsets[-1]), vocabulary))).float()
    base = torch.from_numpy(generator.normal(0, 3, (count, block, vocabulary))).float()
    for i, k in itertools.product(range(count), range(block)):
        if k < lengths[i]:
            noise = generator.normal(0, 0.5, vocabulary)
            base[i, k] = logits[offsets[i] + k] + torch.from_numpy(noise).float()
    sampling = SamplingRows.build(
        generator.choice([0, 0.5, 1, 1.7], count),
        generator.choice([0, 3, 70], count),
        generator.choice([1, 0.9, 0.6], count),
        generator.choice([0, 0.05], count),
        generator.integers(-(2**62), 2**62, count).tolist(),
        generator.integers(0, 2, count),
    )
    positions = torch.from_numpy(generator.integers(0, 1000, count))
    proposals = torch.from_numpy(generator.integers(0, 1000, count))
    rows = torch.from_numpy(generator.permutation(count))
    order = rows.argsort()  # the block lists sequences in another order
    draft = markov_sample(
        base[order],
        torch.zeros(count, block, 1),
        full(count, 0),
        HeadWeights(),
        sampling.take(order),
        positions[order] - 1,
        proposals[order],
    )
    return [logits, offsets, draft.tokens, lengths, draft.logits, draft.log_z, rows, sampling, positions, proposals]


@pytest.mark.parametrize("vocabulary", [6, 50, 4097])
def test_fast_equals_reference(vocabulary: int) -> None:
    generator = np.random.default_rng(vocabulary)
    for _ in range(3):
        logits, *rest = random_case(12 if vocabulary < 100 else 6, vocabulary, generator)
        for fast, slow in zip(verify(logits.clone(), *rest), reference.verify(logits.clone(), *rest), strict=True):
            assert torch.equal(fast, slow)


def test_threads_change_no_bit(three_threads: None) -> None:
    cases = [random_case(30, 300, np.random.default_rng(seed)) for seed in range(10)]
    many = [verify(logits.clone(), *rest) for logits, *rest in cases]
    threads.set_threads(1)
    for (logits, *rest), found in zip(cases, many, strict=True):
        for shared, alone in zip(found, verify(logits.clone(), *rest), strict=True):
            assert torch.equal(shared, alone)


def test_drafts_with_gaps_between_them_are_read_right() -> None:
    logits, offsets, tokens, lengths, draft_logits, log_z, *rest = random_case(12, 50, np.random.default_rng(2))
    apart = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (tokens, draft_logits, log_z)]
    assert not any(part.is_contiguous() for part in apart)
    expected = verify(logits.clone(), offsets, tokens, lengths, draft_logits, log_z, *rest)
    found = verify(logits.clone(), offsets, apart[0], lengths, *apart[1:], *rest)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def some_guessed(case: list, rows: int) -> list:
    """The same case, but of the block's rows from `rows` on nobody knows the distribution; tokens are padded."""
    logits, offsets, tokens, lengths, draft_logits, log_z, *rest = case
    return [logits, offsets, torch.nn.functional.pad(tokens, (0, 3)), lengths, draft_logits[:rows], log_z[:rows], *rest]


@pytest.mark.parametrize("rows", [0, 5])
def test_fast_equals_reference_where_rows_are_guesses(rows: int) -> None:
    logits, *rest = some_guessed(random_case(12, 50, np.random.default_rng(rows)), rows)
    for fast, slow in zip(verify(logits.clone(), *rest), reference.verify(logits.clone(), *rest), strict=True):
        assert torch.equal(fast, slow)


def test_a_sequence_depends_on_nothing_but_itself() -> None:
    logits, offsets, tokens, lengths, *rest, sampling, positions, proposals = random_case(
        10, 300, np.random.default_rng(0)
    )
    draft_logits, log_z, rows = rest
    together = verify(
        logits.clone(), offsets, tokens, lengths, draft_logits, log_z, rows, sampling, positions, proposals
    )
    for i in range(10):
        one = torch.tensor([i])
        alone = verify(
            logits[offsets[i] : offsets[i + 1]].clone(),
            torch.tensor([0, int(lengths[i]) + 1]),
            tokens,
            lengths[one],
            draft_logits,
            log_z,
            rows[one],
            sampling.take(one),
            positions[one],
            proposals[one],
        )
        assert [int(value[0]) for value in alone] == [int(value[i]) for value in together]


# --- edges -----------------------------------------------------------------------------------------------------------


def decide(target: torch.Tensor, draft: torch.Tensor | None, drafted: int, *, count: int = 500, **kind) -> list:
    """`count` seeds decide one drafted token and a bonus from the same two rows; draft None: broken (NaN) logits."""
    vocabulary = target.shape[-1]
    sampling = options(count, **kind)
    block = torch.full((1, vocabulary), float("nan")) if draft is None else draft[None].clone()
    log_z = filter_logits_(block, sampling.take(torch.tensor([0])))
    return list(
        verify(
            target.expand(count, 2, vocabulary).reshape(-1, vocabulary).clone(),
            torch.arange(count + 1) * 2,
            full(1, drafted)[None],
            full(count, 1),
            block[None],
            log_z[None],
            full(count, 0),
            sampling,
            full(count, 9),
            full(count, 4),
        )
    )


def one_hot(token: int, vocabulary: int = 7) -> torch.Tensor:
    return torch.full((vocabulary,), -INF).index_fill_(0, torch.tensor(token), 0.0)


@pytest.mark.parametrize("coupled", [False, True])
def test_disjoint_supports_always_reject_and_follow_the_target(coupled: bool) -> None:
    accepted, chosen, failed = decide(one_hot(2), one_hot(5), 5, coupled=coupled)
    assert not failed.any() and (accepted == 0).all() and (chosen == 2).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_certain_and_equal_always_accepts(coupled: bool) -> None:
    accepted, chosen, failed = decide(one_hot(2), one_hot(2), 2, coupled=coupled)
    assert not failed.any() and (accepted == 1).all() and (chosen == 2).all()


def test_equal_laws_always_accept_also_an_unlikely_token() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    for temperature in (0.3, 1.0, 100.0):
        accepted, _, _ = decide(logits, logits, 17, coupled=False, temperature=temperature)
        assert (accepted == 1).all()


def test_residual_never_picks_a_token_that_the_target_excludes() -> None:
    target = torch.tensor([0.0, 0.0, -INF, -INF, 1e-6])
    draft = torch.tensor([0.0, 1e-6, -9.0, -INF, 0.0])
    for drafted in (2, 3):
        accepted, chosen, _ = decide(target, draft, drafted, coupled=False)
        assert (accepted == 0).all()
        assert set(chosen.tolist()) <= {0, 1, 4}


def test_a_broken_drafter_cannot_bend_the_law() -> None:
    target = torch.tensor([0.3, 1.0, -0.5, 0.0, -INF])
    accepted, chosen, failed = decide(target, None, 3, coupled=False, count=COUNT)
    assert not failed.any() and (accepted == 0).all()
    expected = target.softmax(0).double().numpy()
    seen = np.bincount(chosen.numpy(), minlength=5)
    assert seen[4] == 0
    assert stats.chisquare(seen[:4], expected[:4] / expected[:4].sum() * COUNT).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("coupled", [False, True])
def test_extreme_temperatures(coupled: bool, temperature: float) -> None:
    target = torch.tensor([0.0, 3.0, 1.0])
    accepted, chosen, failed = decide(target, one_hot(1, 3), 1, count=3000, coupled=coupled, temperature=temperature)
    assert not failed.any()
    counts = np.bincount(torch.where(accepted > 0, 1, chosen).numpy(), minlength=3)
    assert counts[1] == 3000 if temperature < 1 else counts.min() > 800


@pytest.mark.parametrize("kind", [{"temperature": 0.0, "coupled": False}, {"coupled": False}, {"coupled": True}])
def test_rows_without_a_distribution_fail_alone(kind: dict) -> None:
    logits = torch.randn(10, 9)
    logits[:, 4] = 20.0
    logits[0, 3] = float("nan")  # sequence 0: first row
    logits[2] = -INF  # sequence 1: first row
    logits[5, 1] = INF  # sequence 2: second row
    logits[7] = float("nan")  # sequence 3: second row, not reached
    tokens = torch.tensor([[4], [4], [4], [0], [4]])
    block = torch.full((5, 1, 9), -INF)
    block.scatter_(2, tokens[:, :, None], 0.0)
    accepted, chosen, failed = verify(
        logits,
        torch.arange(6) * 2,
        tokens,
        full(5, 1),
        block,
        torch.zeros(5, 1),
        torch.arange(5),
        options(5, **kind),
        full(5, 0),
        full(5, 0),
    )
    assert failed.tolist() == [True, True, True, False, False]
    assert accepted.tolist() == [0, 0, 1, 0, 1]
    assert chosen.tolist() == [-1, -1, -1, 4, 4]


def test_certainty_is_the_largest_probability_where_weights_are_at_hand() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(4)) * 3
    sampling = SamplingRows.build(
        [1.0, 0.7, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0], [0, 0, 5, 0, 0, 0, 0, 0], [1.0, 1.0, 1.0, 0.6, 1.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0], list(range(8)), [False] * 6 + [True, False],
    )  # fmt: skip
    filtered = logits.clone()
    log_z = filter_logits_(filtered, sampling)
    expected = (filtered.amax(1) - log_z).exp()
    expected[[5, 6]] = float("nan")  # greedy and coupled rows need no weights
    rows = np.arange(9), np.zeros(8, np.int64), np.full(8, -1), np.arange(8), np.zeros(8, np.int64)
    *_, certainty = verify_arrays(logits.numpy(), np.zeros((0, 0), np.int64), None, None, sampling, *rows)
    np.testing.assert_allclose(certainty, expected.numpy(), rtol=1e-5)


def test_greedy_takes_the_lowest_index_of_a_tie() -> None:
    accepted, chosen, _ = decide(torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.zeros(4), 2, coupled=False, temperature=0.0)
    assert (accepted == 0).all() and (chosen == 1).all()


def test_rejection_without_draft_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="log_z"):
        verify(
            torch.zeros(2, 3),
            torch.tensor([0, 2]),
            torch.zeros(1, 1, dtype=torch.int64),
            full(1, 1),
            None,
            None,
            full(1, 0),
            options(1, coupled=False),
            full(1, 0),
            full(1, 0),
        )


def test_a_large_vocabulary() -> None:
    logits = torch.randn(2, 151_936, generator=torch.Generator().manual_seed(0)) * 4
    for coupled in (False, True):
        arguments = [torch.tensor([0, 1, 2]), torch.zeros((0, 0), dtype=torch.int64), full(2, 0), None, None]
        arguments += [full(2, -1), options(2, coupled=coupled, top_k=1000, top_p=0.9), full(2, 3), full(2, 0)]
        for fast, slow in zip(
            verify(logits.clone(), *arguments), reference.verify(logits.clone(), *arguments), strict=True
        ):
            assert torch.equal(fast, slow)
