"""transformers: `generate` on a batch of equally long prompts; prompt lookup and assistance take one at a time."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Mode, Prompts, serve
from transformers import AutoModelForCausalLM, GenerationConfig


def start(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Mode]]:
    torch.set_num_threads(told["threads"])
    dtype = getattr(torch, told["dtype"])

    def load(directory: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        # The checkpoint's own defaults would sample, and end at its end-of-text token.
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return model

    model = load(told["model"])
    assistant = load(told["assistant"]) if told.get("assistant") else None

    def plain(prompts: Prompts, tokens: int, **how: Any) -> Prompts:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **how)
        return out[:, ids.shape[1] :].tolist()

    def lookup(prompts: Prompts, tokens: int) -> Prompts:
        return [plain([prompt], tokens, prompt_lookup_num_tokens=10)[0] for prompt in prompts]

    def assisted(prompts: Prompts, tokens: int) -> Prompts:
        return [plain([prompt], tokens, assistant_model=assistant)[0] for prompt in prompts]

    modes: dict[str, Mode] = {"plain": plain, "lookup": lookup}
    if assistant is not None:
        modes["assisted"] = assisted
    return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}, modes


if __name__ == "__main__":
    serve(start)
