"""Answers about the model: engine facts to protobuf."""

from __future__ import annotations

from dspark.v1 import generation_pb2 as wire

from engine.messages import EngineInfo, EngineStats, Sampling
from server.checkpoint import Checkpoint


def model_info(
    request_id: str, info: EngineInfo, stats: EngineStats, checkpoint: Checkpoint
) -> wire.GetModelInfoResponse:
    return wire.GetModelInfoResponse(
        request_id=request_id,
        model=info.model,
        parameters=info.parameters,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        dtype=info.dtype,
        device=info.device,
        threads=info.threads,
        eos_token_ids=info.eos_ids,
        has_chat_template=checkpoint.template is not None,
        default_sampling=_sampling(checkpoint.sampling),
        drafter=wire.Drafter(
            kind=info.drafter,
            model=info.draft_model,
            block_size=info.block_size,
            head=info.head,
            has_confidence=info.has_confidence,
        ),
        policy=stats.policy or info.policy,
        seed_reproducible=info.seed_reproducible,
        page_size=info.page_size,
        load=wire.Load(
            running=stats.running,
            waiting=stats.waiting,
            pages_total=stats.pages_total,
            pages_free=stats.pages_free,
            pages_cached=stats.pages_cached,
            rounds=stats.rounds,
        ),
    )


def _sampling(sampling: Sampling) -> wire.Sampling:
    return wire.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
