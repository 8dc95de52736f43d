"""Our engine without its service, in one process as vLLM's: what the service costs is the difference to `ours`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from protocol import Mode, Prompts, serve


def start(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Mode]]:
    sys.path[:0] = [str(Path(__file__).resolve().parents[4])]
    import torch

    from engine.config import EngineConfig
    from engine.loading import load_engine, warm_up
    from engine.types import EndConditions, Request, Sampling

    engine = load_engine(
        EngineConfig(
            model=told["model"],
            dtype=told["dtype"],
            threads=told["threads"],
            max_model_len=told["length"],
            prefix_cache=False,
            policy="plain",
        )
    )
    warm_up(engine)

    def plain(prompts: Prompts, tokens: int) -> Prompts:
        outputs: list[list[int]] = [[] for _ in prompts]
        for index, prompt in enumerate(prompts):
            engine.submit(Request(str(index), tuple(prompt), EndConditions(tokens), Sampling(temperature=0.0)))
        while engine.has_work:
            for delta in engine.step():
                outputs[int(delta.request_id)] += delta.tokens
        return outputs

    return {"versions": {"torch": torch.__version__}}, {"plain": plain}


if __name__ == "__main__":
    serve(start)
