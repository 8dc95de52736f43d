"""One running generation: rounds in, response messages out. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.v1 import generation_pb2 as wire

from engine.messages import FinishReason, TokenDelta, TokenLogprob
from server.accounting import Clock, SpeculationCounts
from server.convert import Prepared
from server.problems import internal
from server.text import Piece, TextStream
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a token keeps with it while its text is held back."""

    drafted: bool
    logprob: TokenLogprob | None


class Generation:
    """Turns the engine's deltas into what the client sees, and counts.

    Stop strings end the text here; `done` then tells the caller to cancel the engine's request.
    """

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, request_id: str, arrived: float) -> None:
        self._prepared = prepared
        self._request_id = request_id
        end = prepared.request.end
        self._text: TextStream[_Origin] = TextStream(tokenizer.piece, prepared.stops, end.min_tokens)
        self._started = False
        self._cached = 0
        self.counts = SpeculationCounts()
        self.clock = Clock(arrived)
        self.reason = wire.FINISH_REASON_UNSPECIFIED

    @property
    def done(self) -> bool:
        return self.reason != wire.FINISH_REASON_UNSPECIFIED

    @property
    def usage(self) -> wire.Usage:
        return wire.Usage(
            prompt_tokens=len(self._prepared.request.prompt),
            completion_tokens=self._text.tokens,
            cached_tokens=self._cached,
        )

    def feed(self, delta: TokenDelta, began: float, ended: float) -> list[wire.GenerateResponse]:
        """Messages to send for one round, which lasted from `began` to `ended`.

        Raises:
            CallError: INTERNAL when the engine gave up on this request.
        """
        if self.done:
            return []
        self.clock.admit(began)
        if delta.finish is FinishReason.ERROR:
            raise internal(delta.error or "the engine could not go on with this request")
        messages = []
        if delta.cached_tokens is not None:
            self._cached = delta.cached_tokens
        if not self._started:
            self._started = True
            started = wire.Started(prompt_tokens=len(self._prepared.request.prompt), cached_tokens=self._cached)
            messages.append(wire.GenerateResponse(request_id=self._request_id, started=started))
        round_ = self._take(delta, ended)
        self._end(delta)
        pieces = self._text.finish() if self.done else self._text.release()
        if pieces or round_ is not None:
            answer = wire.GenerateResponse(request_id=self._request_id, delta=_delta(pieces, round_))
            messages.append(answer)
        if self.done:
            finished = self._finished(delta, ended)
            messages.append(wire.GenerateResponse(request_id=self._request_id, finished=finished))
        return messages

    def _take(self, delta: TokenDelta, now: float) -> wire.Round | None:
        """Takes the round's tokens up to a stop string, and counts what was kept."""
        if delta.tokens:
            self.clock.token(now)
        before = self._text.tokens
        ends_with_id = delta.finish is FinishReason.STOP_ID
        for index, token in enumerate(delta.tokens):
            origin = _Origin(
                drafted=index < delta.accepted,
                logprob=delta.logprobs[index] if index < len(delta.logprobs) else None,
            )
            last = index == len(delta.tokens) - 1
            silent = last and ends_with_id and token in self._prepared.request.end.stop_ids
            self._text.push(token, origin, silent=silent)
        kept = self._text.tokens - before
        if not delta.decode_round:
            return None
        accepted = min(delta.accepted, kept)
        self.counts.add(committed=kept, drafted=delta.drafted, verified=delta.verified, accepted=accepted)
        return wire.Round(drafted=delta.drafted, verified=delta.verified, accepted=accepted, rounds=1)

    def _end(self, delta: TokenDelta) -> None:
        if self._text.stopped is not None:
            self.reason = wire.FINISH_REASON_STOP_STRING
        elif delta.finish is FinishReason.STOP_ID:
            self.reason = wire.FINISH_REASON_STOP_TOKEN
        elif delta.finish is FinishReason.CONTEXT:
            self.reason = wire.FINISH_REASON_CONTEXT
        elif delta.finish is FinishReason.LENGTH:
            bound = self._prepared.context_bound
            self.reason = wire.FINISH_REASON_CONTEXT if bound else wire.FINISH_REASON_LENGTH

    def _finished(self, delta: TokenDelta, now: float) -> wire.Finished:
        finished = wire.Finished(
            reason=self.reason,
            usage=self.usage,
            speculation=speculation_summary(self.counts),
            timing=wire.Timing(
                queue_s=self.clock.queue_s,
                prefill_s=self.clock.prefill_s,
                decode_s=self.clock.decode_s,
                total_s=now - self.clock.arrived,
                ttft_s=self.clock.ttft_s,
                max_gap_s=self.clock.max_gap_s,
            ),
        )
        if self.reason == wire.FINISH_REASON_STOP_STRING and self._text.stopped is not None:
            finished.stop_string = self._text.stopped
        if self.reason == wire.FINISH_REASON_STOP_TOKEN and delta.tokens:
            finished.stop_token_id = delta.tokens[-1]
        return finished


def merged(messages: list[wire.GenerateResponse]) -> list[wire.GenerateResponse]:
    """The same events in fewer messages: neighbouring deltas become one, so that a late writer catches up."""
    result: list[wire.GenerateResponse] = []
    for message in messages:
        if not (result and message.WhichOneof("event") == result[-1].WhichOneof("event") == "delta"):
            result.append(message)
            continue
        into, delta = result[-1].delta, message.delta
        into.text += delta.text
        for name in ("token_ids", "text_lengths", "from_draft", "logprobs"):
            getattr(into, name).extend(getattr(delta, name))
        if delta.HasField("round"):
            for name in ("drafted", "verified", "accepted", "rounds"):
                setattr(into.round, name, getattr(into.round, name) + getattr(delta.round, name))
    return result


def speculation_summary(counts: SpeculationCounts) -> wire.SpeculationSummary:
    return wire.SpeculationSummary(
        rounds=counts.rounds,
        drafted=counts.drafted,
        verified=counts.verified,
        accepted=counts.accepted,
        mean_accepted_length=counts.mean_accepted_length,
        verified_by_position=counts.verified_by_position,
        accepted_by_position=counts.accepted_by_position,
        acceptance_by_position=counts.acceptance_by_position,
    )


def _delta(pieces: list[Piece[_Origin]], round_: wire.Round | None) -> wire.Delta:
    return wire.Delta(
        text="".join(piece.text for piece in pieces),
        token_ids=[piece.token_id for piece in pieces],
        logprobs=[_logprob(piece.tag.logprob) for piece in pieces if piece.tag.logprob is not None],
        text_lengths=[len(piece.text) for piece in pieces],
        from_draft=[piece.tag.drafted for piece in pieces],
        round=round_,
    )


def _logprob(value: TokenLogprob) -> wire.TokenLogprob:
    return wire.TokenLogprob(
        token_id=value.token_id,
        logprob=value.logprob,
        alternatives=[wire.TokenLogprob.Alternative(token_id=token, logprob=logprob) for token, logprob in value.top],
    )
