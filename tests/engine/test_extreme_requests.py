"""Whatever the wire lets through: no value of one request fails the round of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.types import Request, Sampling, Speculation, SpeculationMode, Verification
from tests.engine.helpers import OFF, load, request, run

TINY, HUGE, INT32, UINT32 = 1e-300, 1e300, 2**31 - 1, 2**32 - 1
EXTREMES: dict[str, dict[str, object]] = {
    "highest priority": {"priority": INT32},
    "lowest priority": {"priority": -INT32 - 1},
    "never fast enough": {"min_tokens_per_s": HUGE},
    "always fast enough": {"min_tokens_per_s": TINY},
    "both at once": {"priority": INT32, "min_tokens_per_s": HUGE},
    "longest fixed": {"speculation": Speculation(SpeculationMode.FIXED, draft_tokens=UINT32)},
    "no fixed": {"speculation": Speculation(SpeculationMode.FIXED, draft_tokens=0)},
    "highest threshold": {"speculation": Speculation(SpeculationMode.THRESHOLD, confidence_threshold=1.0)},
    "lowest threshold": {"speculation": Speculation(SpeculationMode.THRESHOLD, confidence_threshold=0.0)},
    "largest cap": {"speculation": Speculation(max_draft_tokens=UINT32)},
    "no cap": {"speculation": Speculation(max_draft_tokens=0, verification=Verification.COUPLED)},
    "hottest": {"sampling": Sampling(temperature=100.0, seed=2**64 - 1)},
    "coldest": {"sampling": Sampling(temperature=1e-3, seed=0)},
    "narrowest": {"sampling": Sampling(top_k=1, top_p=1.5e-45, min_p=1.0)},
    "penalties": {"sampling": Sampling(repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=2.0)},
    "biases": {"sampling": Sampling(logit_bias=((0, 100.0), (1, -100.0), (2, 100.0)))},
}


def extreme(name: str) -> Request:
    return request(name, (7, 8, 9), 8, **EXTREMES[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["auto", "fixed", "threshold", "causal", "relayed"])
def test_a_neighbour_writes_what_it_writes_alone(
    target_dir: Path, drafter_dir: Callable[..., Path], policy: str
) -> None:
    plain = request("neighbour", range(20), 30, Sampling(temperature=0.0))
    alone = run(load(target_dir), [request("neighbour", range(20), 30, Sampling(temperature=0.0), speculation=OFF)])
    engine = load(target_dir, drafter_dir(), policy=policy)
    for together in [[name] for name in EXTREMES] + [list(EXTREMES)]:
        done = run(engine, [plain, *map(extreme, together)])
        engine.check()
        assert done["neighbour"].tokens == alone["neighbour"].tokens
        assert {len(done[name].tokens) for name in together} == {8}
