"""One frozen configuration for the engine, validated once."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import LoadError

POLICIES = ("plain", "fixed", "threshold", "causal", "relayed", "auto")
PAGE_SIZE = 16  # tokens a page; the attention kernels' key tile


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine is told. Sizes are tokens unless a name says otherwise.

    Raises:
        LoadError: a value out of range, naming it.
    """

    model: str  # a directory or a hub id
    draft: str = "none"  # none, a directory or a hub id
    revision: str | None = None
    device: str = "cpu"  # as PyTorch names it; auto: cuda where there is one, else cpu
    dtype: str = "auto"  # auto: the checkpoint's own, on CPU only where it multiplies that; else float32
    threads: int = 1
    kv_memory: int | None = 256 * 2**20  # bytes for both caches together; None: a share of what the device has left
    max_model_len: int | None = None  # None: the model's own limit
    max_running: int = 64
    max_batch_tokens: int = 1024  # rows a round may hold
    prefill_chunk: int = 64  # rows of prompt a round may hold while others decode
    max_queue: int = 256
    policy: str = "auto"  # one of POLICIES
    draft_tokens: int | None = None  # policy fixed: block prefix to verify; None: all of it
    confidence_threshold: float = 0.3  # verify while confidence is at least this
    lookup: bool = True  # policy auto: a sequence that repeats itself may copy instead of draft
    cuda_graphs: bool = True  # on CUDA: rounds stay on the device, replayed as graphs, where they can
    prefix_cache: bool = True
    history: int = 512  # rounds whose decision records are kept
    cost_cache: str | None = None  # folder of measured cost tables; None: the user's cache folder, "": none

    def __post_init__(self) -> None:
        positive = ("threads", "kv_memory", "max_running", "max_batch_tokens", "prefill_chunk", "max_queue", "history")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LoadError(f"{name} must be at least 1, got {value}")
        if self.max_batch_tokens < self.max_running + self.prefill_chunk:
            raise LoadError(
                f"max_batch_tokens {self.max_batch_tokens} cannot hold a row for each of max_running "
                f"{self.max_running} requests and a prefill_chunk of {self.prefill_chunk}; "
                f"raise it to {self.max_running + self.prefill_chunk}"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise LoadError(f"max_model_len must be at least 2, got {self.max_model_len}")
        if self.policy not in POLICIES:
            raise LoadError(f"policy {self.policy!r} is not one of {', '.join(POLICIES)}")
        if not 0.0 <= self.confidence_threshold <= 1.0:
            raise LoadError(f"confidence_threshold must lie in [0, 1], got {self.confidence_threshold}")
        if self.draft_tokens is not None and self.draft_tokens < 0:
            raise LoadError(f"draft_tokens must not be negative, got {self.draft_tokens}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise LoadError(f"dtype {self.dtype!r} is not one of auto, float32, bfloat16, float16")
