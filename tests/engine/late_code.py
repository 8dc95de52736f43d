"""Prints which native functions a served engine compiles only after its warm-up; a process of its own, since what one
engine has compiled another finds."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from numba.core.dispatcher import Dispatcher

from engine.config import POLICIES, EngineConfig
from engine.engine import Engine
from engine.loading import load_engine, warm_up
from engine.types import EndConditions, Request, Sampling, Speculation

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo"
REPEATS = tuple(range(5, 13)) * 5
WAYS = (
    Sampling(temperature=0.0),
    Sampling(),
    Sampling(seed=3),
    Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.02, seed=4),
    Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, logit_bias=((7, 3.0),)),
)


def main() -> None:
    """Serves a bit of everything."""
    draft = sys.argv[1] if sys.argv[1] == "none" else str(DEMO / sys.argv[1])
    engine = load_engine(EngineConfig(model=str(DEMO / "target"), draft=draft, threads=2, kv_memory=2**26))
    warm_up(engine)
    before = _compiled()
    numbers = count()
    for policy in POLICIES if draft != "none" else ("plain",):
        engine.update_policy({"policy": policy})
        for logprobs, cap in ((None, None), (2, 2)):
            for sampling in WAYS:
                speculation = Speculation(max_draft_tokens=cap)
                _run(engine, [Request(str(next(numbers)), REPEATS, EndConditions(40), sampling, speculation, logprobs)])
            many = [Request(str(next(numbers)), REPEATS, EndConditions(20), sampling) for sampling in 3 * WAYS]
            _run(engine, many)
    print(*(name for name, versions in _compiled().items() if versions != before.get(name)))


def _run(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        engine.step()


def _compiled() -> dict[str, int]:
    """Versions in use of every native function, called from Python (entries) or by address (routines)."""
    found = {}
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] in ("engine", "kernels")]:
        for name, each in vars(module).items():
            if isinstance(each, Dispatcher):
                found[f"{each.py_func.__module__}.{each.py_func.__name__}"] = len(each.signatures)
            elif getattr(each, "__module__", "") == "kernels.jit" and hasattr(each, "cache_info"):
                found[f"{module.__name__}.{name}"] = each.cache_info().currsize
    return found


if __name__ == "__main__":
    main()
