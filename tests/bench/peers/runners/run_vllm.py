"""vLLM's CPU build, compiled (its default), engine and caller in one process; no prefix cache, no detokenising."""

from __future__ import annotations

import os
from typing import Any

from protocol import Mode, Prompts, serve


def start(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Mode]]:
    cores = sorted(os.sched_getaffinity(0))[: told["threads"]]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        VLLM_CACHE_ROOT=os.path.join(told["cache"], "vllm"),
        TORCHINDUCTOR_CACHE_DIR=os.path.join(told["cache"], "inductor"),
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import torch
    import vllm

    model = vllm.LLM(
        told["model"],
        dtype=told["dtype"],
        skip_tokenizer_init=True,
        max_model_len=told["length"],
        max_num_seqs=told["requests"],
        enable_prefix_caching=False,
        limit_mm_per_prompt={},
    )

    def plain(prompts: Prompts, tokens: int) -> Prompts:
        how = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(out.outputs[0].token_ids) for out in model.generate(inputs, how, use_tqdm=False)]

    return {"versions": {"vllm-cpu": vllm.__version__, "torch": torch.__version__}}, {"plain": plain}


if __name__ == "__main__":
    serve(start)
