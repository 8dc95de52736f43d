"""Tiny GGUF files of random Gemma 3 weights, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import Gemma3ForCausalLM

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
)
# Joined in this order: "the" by two ways, and pieces that only joined with a space make a token.
WORDS = [
    "th",
    "he",
    "the",
    f"{SPACE}the",
    f"{SPACE}t",
    "in",
    "ing",
    f"{SPACE}a",
    "an",
    "and",
    f"{SPACE}and",
    "ab",
    "aba",
]
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary() -> list[tuple[str, int, float]]:
    """Tokens, kinds and scores: special ones, runs, bytes, joined pieces, letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    runs = ["\n" * n for n in (1, 2, 3)] + [" " * n for n in (2, 3, 4)] + ["<b>"]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz", "é"]
    pieces = [*WORDS, *letters]
    return [
        *((token, CONTROL, -1000.0) for token in special),
        *((token, USER_DEFINED, -1000.0) for token in runs),
        *((f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)),
        *((token, NORMAL, -float(rank)) for rank, token in enumerate(pieces)),
    ]


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in ends:
        return ends[name]
    _, _, index, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{_NAMES[part]}.weight"


def write_gguf(path: Path, model: Gemma3ForCausalLM, kinds: tuple[str, ...] = ("F32",), **changes: Any) -> Path:
    """The model as a GGUF file.

    Args:
        kinds: how matrices are stored, in turns; norms are float32.
        changes: keys to write otherwise, dots as `__`; None leaves one out.
    """
    config = model.config
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, "gemma3")
    keys: dict[str, Any] = {
        "gemma3.context_length": config.max_position_embeddings,
        "gemma3.embedding_length": config.hidden_size,
        "gemma3.block_count": config.num_hidden_layers,
        "gemma3.feed_forward_length": config.intermediate_size,
        "gemma3.attention.head_count": config.num_attention_heads,
        "gemma3.attention.head_count_kv": config.num_key_value_heads,
        "gemma3.attention.key_length": config.head_dim,
        "gemma3.attention.value_length": config.head_dim,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": config.sliding_window,
        "gemma3.rope.freq_base": rope["full_attention"]["rope_theta"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    if rope["full_attention"]["rope_type"] == "linear":
        keys |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": rope["full_attention"]["factor"]}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    tokens, types, scores = (list(column) for column in zip(*vocabulary(), strict=True))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    matrices = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.detach().float()
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), (values + 1).numpy())
            continue
        kind = gguf.GGMLQuantizationType[kinds[matrices % len(kinds)]]
        matrices += 1
        stored = gguf.quantize(values.numpy(), kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bfloat16_weights(model: Gemma3ForCausalLM) -> Gemma3ForCausalLM:
    """The same model with weights that bfloat16 holds exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model
