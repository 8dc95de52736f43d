"""The shape of what `Client.info` returns: the wire's own names, plain values."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class SamplingDefaults(TypedDict):
    """What absent sampling fields mean for the model; a field that is absent here is off."""

    temperature: NotRequired[float]
    top_k: NotRequired[int]
    top_p: NotRequired[float]
    min_p: NotRequired[float]
    repetition_penalty: NotRequired[float]
    presence_penalty: NotRequired[float]
    frequency_penalty: NotRequired[float]


class DrafterInfo(TypedDict):
    kind: str  # none, dspark, dflash, eagle3, mtp
    model: str
    block_size: int
    head: str
    has_confidence: bool


class LoadInfo(TypedDict):
    """The engine at this moment."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    rounds: int


class ModelInfo(TypedDict):
    request_id: str
    model: str
    parameters: int
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    threads: int
    eos_token_ids: list[int]
    has_chat_template: bool
    default_sampling: SamplingDefaults
    drafter: DrafterInfo
    policy: str
    seed_reproducible: bool
    page_size: int
    load: LoadInfo
