"""The DSpark paper's counterexample (Appendix A): why lengths may not look at the tokens they admit.

One request, γ = 2, tokens A and B. The second confidence is .9 after A and 0 after B; rounds a second are
1, .5 and .45 for batches of one, two and three rows.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

TARGET = {"A": Fraction(7, 10), "B": Fraction(3, 10)}
DRAFT = {"A": Fraction(1, 2), "B": Fraction(1, 2)}
FIRST = Fraction(8, 10)
SECOND = {"A": Fraction(9, 10), "B": Fraction(0)}
SPEED = (Fraction(1), Fraction(1, 2), Fraction(45, 100))


def throughput(length: int, second: Fraction) -> Fraction:
    """Θ(ℓ): expected tokens a round times rounds a second."""
    survival = (Fraction(1), FIRST, FIRST * second)
    return sum(survival[: length + 1], Fraction(0)) * SPEED[length]


def retrospective(drafted: str) -> int:
    """The best of all lengths, searched with the confidence that already knows x_1."""
    return max(range(3), key=lambda length: throughput(length, SECOND[drafted]))


def causal(drafted: str) -> int:
    """Stop at the first token that does not raise Θ: x_1 is decided before anything computed from it."""
    length = 0
    while length < 2 and throughput(length + 1, SECOND[drafted]) > throughput(length, SECOND[drafted]):
        length += 1
    return length


def probability_of_a(policy: Callable[[str], int]) -> Fraction:
    """Exact probability that the first token out is A, under rejection verification."""
    total = Fraction(0)
    for drafted, p in DRAFT.items():
        if policy(drafted) == 0:
            total += p * TARGET["A"]
            continue
        keep = min(Fraction(1), TARGET[drafted] / DRAFT[drafted])
        residual = {token: max(TARGET[token] - DRAFT[token], Fraction(0)) for token in TARGET}
        total += p * keep * (drafted == "A")
        if keep < 1:
            total += p * (1 - keep) * residual["A"] / sum(residual.values())
    return total
