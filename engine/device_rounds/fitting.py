"""What may stay on the device: models, policies and sequences that can do without the host inside a round."""

from __future__ import annotations

from engine.drafters.drafter import Drafter
from engine.drafters.dspark import DSparkDrafter
from engine.models.decoder import DecoderModel
from engine.schedule.policies import AutoLengths, LengthPolicy, RelayedLengths, StaticLengths
from engine.types import Sequence


def fits(target: DecoderModel, drafter: Drafter | None) -> bool:
    """Whether the target has plain layers alone, and the drafter blocks in one pass and a head that a kernel runs."""
    if not all(layer.plain for layer in target.layers):
        return False
    return drafter is None or (isinstance(drafter, DSparkDrafter) and drafter.heads.step is None)


def decides_ahead(policy: LengthPolicy | None) -> bool:
    """Whether a policy can do with a rule or a budget that is older than the blocks. `causal` looks as it goes."""
    return policy is None or isinstance(policy, StaticLengths | AutoLengths | RelayedLengths)


def needs_nobody(sequence: Sequence) -> bool:
    """Whether the host is not needed for a decoding sequence from round to round."""
    request = sequence.request
    masked = request.end.stop_ids and sequence.output_length < request.end.min_tokens
    return not (masked or request.sampling.edits_logits or request.logprobs is not None)
