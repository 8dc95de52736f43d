"""One running generation: rounds in, response messages out. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from dspark.v1 import generation_pb2 as wire

from engine.messages import FinishReason, TokenDelta, TokenLogprob
from server.accounting import Clock, SpeculationCounts
from server.convert import Prepared
from server.problems import not_finite
from server.streams import Arrival
from server.text import Piece, TextStream
from server.tokenizer import Tokenizer


class _Origin(NamedTuple):
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

    def feed(self, arrivals: Sequence[Arrival]) -> list[wire.GenerateResponse]:
        """Messages to send for the rounds that have come: one delta for all of them, so that a late writer catches up.

        Raises:
            CallError: DATA_LOSS when the engine gave up on this request.
        """
        if self.done:
            return []
        messages = []
        if not self._started:
            self._started = True
            self._cached = arrivals[0].delta.cached_tokens or 0
            started = wire.Started(prompt_tokens=len(self._prepared.request.prompt), cached_tokens=self._cached)
            messages.append(wire.GenerateResponse(request_id=self._request_id, started=started))
        before = replace(self.counts)
        for delta, began, ended in arrivals:
            self.clock.admit(began)
            if delta.finish is FinishReason.ERROR:
                raise not_finite(delta.error or "the engine could not go on with this request")
            self._take(delta, ended)
            self._end(delta)
            if self.done:
                break
        pieces = self._text.finish() if self.done else self._text.release()
        if pieces or self.counts.rounds > before.rounds:
            messages.append(self._delta(pieces, before))
        if self.done:
            finished = self._finished(delta, ended)
            messages.append(wire.GenerateResponse(request_id=self._request_id, finished=finished))
        return messages

    def _take(self, delta: TokenDelta, now: float) -> None:
        """Takes the round's tokens up to a stop string, and counts what was kept."""
        if delta.tokens:
            self.clock.token(now)
        before = self._text.tokens
        ends_with_id = delta.finish is FinishReason.STOP_ID
        last = len(delta.tokens) - 1
        for index, token in enumerate(delta.tokens):
            logprob = delta.logprobs[index] if index < len(delta.logprobs) else None
            silent = ends_with_id and index == last and token in self._prepared.request.end.stop_ids
            self._text.push(token, _Origin(index < delta.accepted, logprob), silent=silent)
        if delta.decode_round:
            kept = self._text.tokens - before
            accepted = min(delta.accepted, kept)
            self.counts.add(committed=kept, drafted=delta.drafted, verified=delta.verified, accepted=accepted)

    def _delta(self, pieces: list[Piece[_Origin]], before: SpeculationCounts) -> wire.GenerateResponse:
        """`pieces`, and what was counted since `before`. Filled in place: a message given to another is copied."""
        message = wire.GenerateResponse(request_id=self._request_id)
        delta = message.delta
        delta.text = "".join([piece.text for piece in pieces])
        delta.token_ids.extend([piece.token_id for piece in pieces])
        delta.text_lengths.extend([len(piece.text) for piece in pieces])
        delta.from_draft.extend([piece.tag.drafted for piece in pieces])
        if logprobs := [piece.tag.logprob for piece in pieces if piece.tag.logprob is not None]:
            delta.logprobs.extend(map(_logprob, logprobs))
        if self.counts.rounds > before.rounds:
            round_ = delta.round
            round_.drafted = self.counts.drafted - before.drafted
            round_.verified = self.counts.verified - before.verified
            round_.accepted = self.counts.accepted - before.accepted
            round_.rounds = self.counts.rounds - before.rounds
        return message

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
        mean_verify_budget=counts.mean_verify_budget,
        draft_skip_share=counts.draft_skip_share,
    )


def _logprob(value: TokenLogprob) -> wire.TokenLogprob:
    return wire.TokenLogprob(
        token_id=value.token_id,
        logprob=value.logprob,
        alternatives=[wire.TokenLogprob.Alternative(token_id=token, logprob=logprob) for token, logprob in value.top],
    )
