"""What a GGUF file says of a Gemma 3 decoder, in the words of its config.json.

llama.cpp's names and conventions: norms come with the 1 of 1 + w added; scales, windows and the local rope that the
file leaves out are constants of the family.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.errors import LoadError
from engine.models.gguf.source import Source

ARCHITECTURE = "gemma3"
_PATTERN = 6  # every sixth layer sees everything
_LAYERS_27B = 62  # the one size whose scores are divided by √(hidden ÷ heads) and not by √head_dim
_REFUSED = ("attn_logit_softcapping", "final_logit_softcapping")
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Target(NamedTuple):
    """Where a tensor goes, and what is added to it on the way."""

    name: str
    offset: float


def tensor_targets(source: Source) -> dict[str, Target]:
    """Every tensor of the file by name.

    Raises:
        LoadError: one that a Gemma 3 decoder has no place for, or none for a place; names it.
    """
    layers = source.get(f"{ARCHITECTURE}.block_count", int)
    expected = {f"blk.{i}.{name}.weight" for i in range(layers) for name in _LAYER}
    expected |= set(_ENDS) - {"output.weight"}
    missing = sorted(expected - set(source.tensors))
    if missing:
        raise LoadError(f"{source.path}: tensor {missing[0]} is missing; fetch the file again")
    targets = {}
    for name in source.tensors:
        if name in _ENDS:
            target = _ENDS[name]
        elif name in expected:
            _, index, part, _ = name.split(".")
            target = f"model.layers.{index}.{_LAYER[part]}.weight"
        else:
            raise LoadError(f"{source.path}: tensor {name} has no place in a Gemma 3 decoder")
        targets[name] = Target(target, -1.0 if name.endswith("norm.weight") else 0.0)
    return targets


def read_config(source: Source) -> dict[str, Any]:
    """config.json.

    Raises:
        LoadError: another architecture; a key is missing, or asks for something that is not served.
    """
    architecture = source.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise LoadError(f"{source.path}: GGUF architecture {architecture!r} is not converted, only {ARCHITECTURE!r}")

    def own(key: str, kind: type, default: Any = None) -> Any:
        return source.get(f"{ARCHITECTURE}.{key}", kind, default)

    for key in _REFUSED:
        if own(key, float, 0.0):
            raise LoadError(f"{source.path}: {key} is not served for Gemma 3")
    heads, hidden, layers = (own(k, int) for k in ("attention.head_count", "embedding_length", "block_count"))
    head_dim = own("attention.key_length", int, 256)
    if own("attention.value_length", int, head_dim) != head_dim:
        raise LoadError(f"{source.path}: keys and values of different lengths are not served")
    pattern = own("attention.sliding_window_pattern", int, _PATTERN)
    if pattern < 1:
        raise LoadError(f"{source.path}: {ARCHITECTURE}.attention.sliding_window_pattern must be positive")
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": own("rope.freq_base", float, 1e6)}
    scaling = own("rope.scaling.type", str, "none")
    if scaling == "linear":
        full |= {"rope_type": "linear", "factor": own("rope.scaling.factor", float)}
    elif scaling != "none":
        raise LoadError(f"{source.path}: rope scaling {scaling!r} is not served, only linear")
    local = {"rope_type": "default", "rope_theta": own("rope.freq_base_swa", float, 1e4)}
    shape = source.tensors.get("token_embd.weight", (0,))
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": shape[0],
        "hidden_size": hidden,
        "intermediate_size": own("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": own("context_length", int),
        "rms_norm_eps": float(f"{own('attention.layer_norm_rms_epsilon', float):.6g}"),  # stored as float32
        "query_pre_attn_scalar": hidden // heads if layers == _LAYERS_27B else head_dim,
        "sliding_window": own("attention.sliding_window", int),
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": source.get("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": source.get("tokenizer.ggml.padding_token_id", int, 0),
    }
