"""Write the trained target, or drafter, in the public Hugging Face layouts, in bf16.

python -m engine.training.export --state FILE --out TARGET_DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import LoadError
from engine.models.gemma3 import Gemma3Model
from engine.models.loader import read_json
from engine.training.gemma3 import Target, read_gemma3_target
from engine.training.model import ModelConfig, Qwen3


def qwen3_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Qwen3 config.json that follow from the sizes."""
    return {
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """config.json and model.safetensors; floating-point tensors are rounded to bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {name: torch.bfloat16 if t.is_floating_point() else t.dtype for name, t in tensors.items()}
    rounded = {name: t.detach().to(kinds[name]).contiguous() for name, t in tensors.items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(rounded, str(temporary), metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / "model.safetensors")
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(folder / "config.json")


def write_target(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """A Qwen3ForCausalLM folder; token 0 ends a document and token 2 ends a chat turn."""
    write(folder, {"architectures": ["Qwen3ForCausalLM"], **qwen3_keys(config)}, tensors)
    generation: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}
    generation |= {"eos_token_id": [0, 2], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def read_target(folder: Path) -> Target:
    """The served target: bf16-rounded weights held in fp32, frozen, in evaluation mode.

    Raises:
        LoadError: a file is missing or damaged, a key or tensor missing or of the wrong kind; names it.
    """
    raw, names = read_json(folder / "config.json"), ModelConfig.__dataclass_fields__
    if raw.get("architectures", [""])[0] in Gemma3Model.ARCHITECTURES:
        return read_gemma3_target(folder, raw)
    missing = [name for name in names if name not in raw]
    if missing:
        raise LoadError(f"{folder / 'config.json'}: {missing[0]} is missing; a target of Qwen3's family needs it")
    model = Qwen3(ModelConfig(**{name: raw[name] for name in names}))
    path = folder / "model.safetensors"
    try:
        model.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error
    except RuntimeError as error:
        raise LoadError(f"{path} does not hold the tensors that config.json beside it implies: {error}") from error
    return model.requires_grad_(False).eval()


def carry_notices(target: Path, folder: Path) -> None:
    """Copy a target's terms, licences and notices beside a drafter: it was made from the target's outputs.

    Gemma's terms ask for it; a target without such files leaves nothing.
    """
    kinds = ("NOTICE*", "LICENSE*", "*_TERMS.html")
    for path in sorted({path for kind in kinds for path in target.glob(kind) if path.is_file()}):
        text = path.read_bytes()
        if path.name == "NOTICE":
            text += b"\nDerived: the drafter in this folder was trained on the outputs of those weights.\n"
        (folder / path.name).write_bytes(text)


def main() -> None:
    """Export a pretraining state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.state, weights_only=True)
    write_target(args.out, ModelConfig(**state["config"]), state["model"])


if __name__ == "__main__":
    main()
