"""Apply a Verdict: append, end, publish, free, and say what happened."""

from __future__ import annotations

from collections.abc import Callable

from engine.page_groups import PageGroups
from engine.prefix_cache import PrefixCache
from engine.types import DraftBlock, FinishReason, Phase, PlanRow, Sequence, StepPlan, TokenDelta, Verdict


class Committer:
    """Turns verdicts into committed tokens and messages.

    Args:
        running: the engine's list of running sequences; finished ones leave it here.
    """

    def __init__(
        self,
        pages: PageGroups,
        cache: PrefixCache,
        running: list[Sequence],
        max_length: int,
    ) -> None:
        self.pages = pages
        self.cache = cache
        self.running = running
        self.max_length = max_length
        self.before_end: Callable[[Sequence], None] = lambda sequence: None  # last chance to complete its pages
        self.give_back: Callable[[Sequence], None] = pages.give_back

    def apply(self, plan: StepPlan, block: DraftBlock | None, verdict: Verdict) -> list[TokenDelta]:
        """One message for every sequence that something happened to."""
        drafts = {}
        if block is not None:
            tokens = block.tokens.tolist()
            for index, sequence in enumerate(block.sequences):
                drafts[id(sequence)] = tokens[index]
                # Counts every block, also one whose sequence was preempted: its noise must never serve twice.
                sequence.proposals += 1
        deltas = []
        for index, row in enumerate(plan.rows):
            sequence = row.sequence
            if not sequence.announced:
                sequence.announced = True
                deltas.append(TokenDelta(sequence.request.request_id, cached_tokens=sequence.cached_tokens))
            token = verdict.next_token[index]
            if verdict.failed[index]:
                deltas.append(self._fail(sequence))
            elif token is None:
                sequence.kv_length = row.start + row.count
                self.cache.publish(sequence)
                self.pages.leave(sequence)
            else:
                kept = drafts.get(id(sequence), [])[: verdict.accepted[index]]
                deltas.append(self._extend(row, [*kept, token], verdict, index))
        return deltas

    def _extend(self, row: PlanRow, tokens: list[int], verdict: Verdict, index: int) -> TokenDelta:
        sequence, accepted = row.sequence, verdict.accepted[index]
        was_decoding = sequence.phase is Phase.DECODE
        tokens, finish = self._end(sequence, tokens)
        sequence.tokens += tokens
        if sequence.request.sampling.edits_logits:
            for token in tokens:
                sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
        # The anchor and the accepted tokens are in the caches now, the new last token is not.
        written = row.start + row.count - row.draft_length + accepted
        sequence.kv_length = min(written, len(sequence.tokens) - 1)
        sequence.absorbed = min(sequence.absorbed, sequence.kv_length)
        sequence.phase = Phase.DECODE
        if finish is not None:
            self.before_end(sequence)
        self.cache.publish(sequence)
        self.pages.leave(sequence)
        if finish is not None:
            self.finish(sequence)
        return TokenDelta(
            request_id=sequence.request.request_id,
            tokens=tuple(tokens),
            logprobs=verdict.logprobs[index][: len(tokens)],
            finish=finish,
            decode_round=was_decoding,
            drafted=row.drafted or row.copied,
            verified=row.draft_length,
            accepted=min(accepted, len(tokens)),
        )

    def _end(self, sequence: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """`tokens` up to and including the one that ends the sequence, and why it ends."""
        end = sequence.request.end
        for count, token in enumerate(tokens, start=1):
            output = sequence.output_length + count
            if token in end.stop_ids and output > end.min_tokens:
                return tokens[:count], FinishReason.STOP_ID
            if output >= end.max_tokens:
                return tokens[:count], FinishReason.LENGTH
            if len(sequence.tokens) + count >= self.max_length:
                return tokens[:count], FinishReason.CONTEXT
        return tokens, None

    def _fail(self, sequence: Sequence) -> TokenDelta:
        # What broke may have been written into them, and everybody with the same beginning would break too.
        self.pages.unpublish(sequence)
        self.finish(sequence)
        message = "the model's logits are not finite for this request"
        return TokenDelta(sequence.request.request_id, finish=FinishReason.ERROR, error=message)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and give its pages back."""
        self.running.remove(sequence)
        self.give_back(sequence)
        sequence.phase = Phase.FINISHED
