"""Apply a Verdict: append, end, publish, free, and say what happened."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import PAGE_SIZE
from engine.page_groups import PageGroups
from engine.prefix_cache import PrefixCache
from engine.types import (
    DraftBlock,
    FinishReason,
    Phase,
    PlanRow,
    Sequence,
    StepPlan,
    TokenDelta,
    TokenLogprob,
    Verdict,
)


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
        drafts: list[list[int]] = []
        places: dict[int, int] = {}
        if block is not None:
            drafts = (block.tokens if block.host is None else block.host.tokens).tolist()
            places = block.places
            for sequence in block.sequences:
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
                self._settle_pages(sequence)
            else:
                accepted = verdict.accepted[index]
                tokens = [token]
                if accepted:
                    tokens = drafts[places[id(sequence)]][:accepted]
                    tokens.append(token)
                deltas.append(self._extend(row, tokens, accepted, verdict.logprobs[index]))
        return deltas

    def _extend(self, row: PlanRow, tokens: list[int], accepted: int, logprobs: tuple[TokenLogprob, ...]) -> TokenDelta:
        sequence, request = row.sequence, row.sequence.request
        was_decoding = sequence.phase is Phase.DECODE
        tokens, finish = self._end(sequence, tokens)
        sequence.tokens += tokens
        if request.sampling.edits_logits:
            for token in tokens:
                sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
        # The anchor and the accepted tokens are in the caches now, the new last token is not.
        written = min(row.start + row.count - row.draft_length + accepted, len(sequence.tokens) - 1)
        sequence.kv_length = written
        if sequence.absorbed > written:
            sequence.absorbed = written
        sequence.phase = Phase.DECODE
        if finish is not None:
            self.before_end(sequence)
        self._settle_pages(sequence)
        if finish is not None:
            self.finish(sequence)
        count = len(tokens)
        return TokenDelta(
            request.request_id,
            tuple(tokens),
            logprobs[:count] if logprobs else (),
            finish,
            "",
            was_decoding,
            row.drafted or row.copied,
            row.draft_length,
            accepted if accepted < count else count,
        )

    def _settle_pages(self, sequence: Sequence) -> None:
        """Publish the pages that this round completed; give back those that no row to come sees."""
        if sequence.kv_length >= (len(sequence.page_hashes) + 1) * PAGE_SIZE:
            self.cache.publish(sequence)
        if self.pages.windows is not None:
            self.pages.leave(sequence)

    def _end(self, sequence: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """`tokens` up to and including the one that ends the sequence, and why it ends."""
        end = sequence.request.end
        longest = len(sequence.tokens) + len(tokens)
        early = longest < self.max_length and longest - sequence.prompt_length < end.max_tokens
        if early and end.stop_ids.isdisjoint(tokens):
            return tokens, None
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
