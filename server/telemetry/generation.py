"""The span of one generation: what was asked, what came, and what speculation did for it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import grpc
from dspark.v1 import generation_pb2 as wire
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from engine.messages import Verification
from server.convert import Prepared
from server.generation import Generation
from server.problems import CallError, cut_off
from server.streams import EngineFailed
from server.telemetry import GenerationWatch
from server.telemetry.instruments import Instruments
from server.telemetry.interceptor import FAILURES
from server.telemetry.rounds import Served
from server.telemetry.times import epoch_ns

MAX_CONTENT = 32_768  # characters of a captured text
REASONS = {
    wire.FINISH_REASON_STOP_TOKEN: "stop",
    wire.FINISH_REASON_STOP_STRING: "stop",
    wire.FINISH_REASON_LENGTH: "length",
    wire.FINISH_REASON_CONTEXT: "length",
}


class GenerationSpan(GenerationWatch):
    """Follows one generation into a span and into the instruments.

    Args:
        content: whether texts may be recorded.

    `served`, when set, is told the engine's name of the request.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        instruments: Instruments,
        model: str,
        policy: str,
        request: wire.GenerateRequest,
        prepared: Prepared,
        generation: Generation,
        *,
        content: bool = False,
    ) -> None:
        self._instruments = instruments
        self._prepared = prepared
        self._generation = generation
        self.served: Served | None = None
        self._first_chunk: float | None = None
        self.span = tracer.start_span(
            f"text_completion {model}",
            kind=SpanKind.INTERNAL,
            attributes=instruments.model,
            start_time=epoch_ns(generation.clock.arrived),
        )
        self._texts: list[str] | None = [] if content and self.span.is_recording() else None
        if self.span.is_recording():
            self.span.set_attributes(_asked(prepared))
            self.span.set_attributes(_speculation_asked(prepared, policy))
            if self._texts is not None:
                self.span.set_attributes(_content_asked(request, prepared))

    def opened(self, key: str) -> None:
        if self.served is not None:
            self.served.key = key

    def wrote(self, message: wire.GenerateResponse) -> None:
        if not message.HasField("delta"):
            return
        if self._first_chunk is None:
            self._first_chunk = time.monotonic()
        if self._texts is not None:
            self._texts.append(message.delta.text)

    def finish(self, error: BaseException | None, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Ends the span and measures. Inside the span's context."""
        counts, clock, usage = self._generation.counts, self._generation.clock, self._generation.usage
        instruments, model = self._instruments, self._instruments.model
        total_s = time.monotonic() - clock.arrived
        status = _status(error, context, total_s)
        instruments.request_duration.record(total_s, model if status == "OK" else {**model, "error.type": status})
        if clock.admitted is not None:
            instruments.queue.record(clock.queue_s)
            instruments.prompt.add(usage.prompt_tokens)
            instruments.cached.add(usage.cached_tokens)
            instruments.usage.record(usage.prompt_tokens, {**model, "gen_ai.token.type": "input"})
            instruments.usage.record(usage.completion_tokens, {**model, "gen_ai.token.type": "output"})
        if status == "OK":
            instruments.first_token.record(clock.ttft_s, model)
            if usage.completion_tokens > 1:
                instruments.per_token.record((total_s - clock.ttft_s) / (usage.completion_tokens - 1), model)
        span = self.span
        if span.is_recording():
            span.set_attributes(
                {
                    "gen_ai.response.id": self._prepared.request.request_id,
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                    "dspark.rounds": counts.rounds,
                    "dspark.drafted": counts.drafted,
                    "dspark.verified": counts.verified,
                    "dspark.accepted": counts.accepted,
                    "dspark.mean_accepted_length": counts.mean_accepted_length,
                    "dspark.acceptance_by_position": counts.acceptance_by_position,
                    "dspark.draft_skip_share": counts.draft_skip_share,
                    "dspark.queue_s": clock.queue_s,
                    "dspark.prefill_s": clock.prefill_s,
                    "dspark.decode_s": clock.decode_s,
                    "dspark.max_gap_s": clock.max_gap_s,
                }
            )
            self._say_how_it_ended(status)
        span.end()

    def _say_how_it_ended(self, status: str) -> None:
        span, reason = self.span, self._generation.reason
        if self._first_chunk is not None:
            seconds = self._first_chunk - self._generation.clock.arrived
            span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        if self._generation.done:
            span.set_attribute("gen_ai.response.finish_reasons", [REASONS[reason]])
            span.set_attribute(
                "dspark.finish_reason", wire.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
            )
        if status != "OK":
            span.set_attribute("error.type", status)
            if status in FAILURES:
                span.set_status(Status(StatusCode.ERROR))
        if self._texts is not None:
            parts = [{"type": "text", "content": _clip("".join(self._texts))}]
            answer = {"role": "assistant", "parts": parts, "finish_reason": REASONS.get(reason, "error")}
            span.set_attribute("gen_ai.output.messages", json.dumps([answer], ensure_ascii=False))


def _asked(prepared: Prepared) -> dict[str, Any]:
    sampling = prepared.request.sampling
    asked: dict[str, Any] = {
        "gen_ai.output.type": "text",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": prepared.request.end.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": float(sampling.top_k),
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if (seed := sampling.seed) is not None:
        asked["gen_ai.request.seed"] = seed if seed < 2**63 else str(seed)  # integers on the wire have 63 bits
    return asked


def _speculation_asked(prepared: Prepared, policy: str) -> dict[str, Any]:
    speculation = prepared.request.speculation
    verification = speculation.verification
    if verification is None:
        seeded = prepared.request.sampling.seed is not None
        verification = Verification.COUPLED if seeded else Verification.REJECTION
    return {
        "dspark.policy": policy,
        "dspark.speculation_mode": speculation.mode.value,
        "dspark.verification": verification.value,
    }


def _content_asked(request: wire.GenerateRequest, prepared: Prepared) -> dict[str, Any]:
    kind = request.WhichOneof("prompt")
    messages: list[tuple[str, str, Any]]
    if kind == "chat":
        messages = [(message.role, "text", _clip(message.content)) for message in request.chat.messages]
    elif kind == "text":
        messages = [("user", "text", _clip(request.text))]
    else:
        messages = [("user", "token_ids", list(prepared.request.prompt[: MAX_CONTENT // 8]))]
    parts = [{"role": role, "parts": [{"type": type_, "content": content}]} for role, type_, content in messages]
    asked: dict[str, Any] = {"gen_ai.input.messages": json.dumps(parts, ensure_ascii=False)}
    if prepared.stops:
        asked["gen_ai.request.stop_sequences"] = prepared.stops
    return asked


def _clip(text: str) -> str:
    return text if len(text) <= MAX_CONTENT else text[: MAX_CONTENT - 1] + "…"


def _status(error: BaseException | None, context: grpc.aio.ServicerContext[Any, Any], total_s: float) -> str:
    match error:
        case None:
            return "OK"
        case CallError():
            return error.code.name
        case asyncio.CancelledError():
            return cut_off(context, total_s)
        case EngineFailed():
            return "UNAVAILABLE"
    return "INTERNAL"
