"""Decide how much of each draft the target keeps, and the token after it: the step that makes speculation lossless."""

from __future__ import annotations

import numpy as np
import torch

from kernels.device import has_kernels
from kernels.filters import SamplingRows, filter_row, scale_row
from kernels.jit import entry, native
from kernels.noise import Purpose, pick, uniform
from kernels.reference import verify as reference
from kernels.vector import draw, exp_float32, first_index, row_maximum, total_weight


def verify(
    logits: torch.Tensor,
    logit_offsets: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_log_z: torch.Tensor | None,
    draft_rows: torch.Tensor,
    sampling: SamplingRows,
    positions: torch.Tensor,
    proposals: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Verify R sequences: sequence i owns the target's rows logit_offsets[i] … + ℓ_i and the block's row draft_rows[i].

    logits [L, V] float32 after penalties (overwritten by filtered values), logit_offsets [R + 1] int64. The block has
    D rows: draft_tokens [D, γ] int64, draft_logits [D, γ, V] and draft_log_z [D, γ] as `markov_sample` returns them
    (None when no row samples by rejection). draft_rows [R] int64 is −1 where ℓ_i = 0, draft_lengths ℓ [R] int64.
    `positions` [R] is the position of the first decided token, `proposals` [R] the counter the draft was made with.

    Rows of draft_tokens beyond those of draft_logits, which may have none, are guesses drawn from no distribution.

    Rejection keeps x with probability min(1, p_t(x)/p_d(x)) and otherwise draws from max(p_t − p_d, 0); of a guess, it
    draws from p_t and keeps x where that is the token: with probability p_t(x), too. Coupled keeps x
    while it equals argmax(log p_t − log E) with the noise of that position; greedy is the argmax. ℓ = 0 is plain
    decoding. Returns accepted [R] int64, next_token [R] int64 (−1 where failed), failed [R] bool: a row that was needed
    held NaN, +inf, or nothing but −inf.

    Raises:
        ValueError: a sequence that samples by rejection has drafted tokens but the block has no logits.
    """
    on_device = has_kernels(logits)
    if on_device or logits.device.type != "cpu" or logits.dtype != torch.float32:
        # Without a drafted token there is nothing to ask: nobody waits for a device to say so.
        if (draft_logits is None or draft_log_z is None) and draft_tokens.numel() and sampling.any_rejection:
            rejection = (sampling.temperature > 0) & ~sampling.coupled
            if bool((rejection & (draft_lengths > 0)).any()):
                raise ValueError("verification by rejection needs the draft's logits and log_z")
        if on_device:
            from kernels.triton import verify as device

            return device.verify(
                logits, logit_offsets, draft_tokens, draft_lengths, draft_logits, draft_log_z, draft_rows, sampling,
                positions, proposals,
            )  # fmt: skip
        return reference.verify(
            logits, logit_offsets, draft_tokens, draft_lengths, draft_logits, draft_log_z, draft_rows, sampling,
            positions, proposals,
        )  # fmt: skip
    rows = (logit_offsets, draft_lengths, draft_rows, positions, proposals)
    accepted, next_token, failed, _ = verify_arrays(
        logits.numpy(),
        draft_tokens.numpy(),
        None if draft_logits is None else draft_logits.numpy(),
        None if draft_log_z is None else draft_log_z.numpy(),
        sampling,
        *(row.numpy() for row in rows),
    )
    return torch.from_numpy(accepted), torch.from_numpy(next_token), torch.from_numpy(failed)


def verify_arrays(
    logits: np.ndarray,
    draft_tokens: np.ndarray,
    draft_logits: np.ndarray | None,
    draft_log_z: np.ndarray | None,
    sampling: SamplingRows,
    logit_offsets: np.ndarray,
    draft_lengths: np.ndarray,
    draft_rows: np.ndarray,
    positions: np.ndarray,
    proposals: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`verify` on the host's arrays: making tensors of these few numbers takes longer than deciding.

    Fourth comes how certain the target was, [R] float64: its largest probability at the first decided position, where
    that costs nothing (rejection); NaN elsewhere.
    """
    if (draft_logits is None or draft_log_z is None) and sampling.any_rejection:
        rejection = (sampling.filters[0] > 0) & ~sampling.noise[1]
        if (rejection & (draft_lengths > 0)).any():
            raise ValueError("verification by rejection needs the draft's logits and log_z")
    count = len(draft_lengths)
    accepted, next_token = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    failed, certainty = np.zeros(count, np.bool_), np.full(count, np.nan)
    _verify(
        logits,
        logit_offsets,
        draft_tokens,
        draft_lengths,
        _NO_LOGITS if draft_logits is None else draft_logits,
        _NO_LOG_Z if draft_log_z is None else draft_log_z,
        draft_rows,
        *sampling.filters,
        *sampling.noise,
        positions,
        proposals,
        accepted,
        next_token,
        failed,
        certainty,
    )
    return accepted, next_token, failed, certainty


_NO_LOGITS, _NO_LOG_Z = np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.float32)
_ACCEPT, _RESIDUAL, _COUPLED = int(Purpose.ACCEPT), int(Purpose.RESIDUAL), int(Purpose.COUPLED)


@entry
def _verify(
    logits: np.ndarray,
    offsets: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    draft_logits: np.ndarray,
    draft_log_z: np.ndarray,
    draft_rows: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    coupled: np.ndarray,
    positions: np.ndarray,
    proposals: np.ndarray,
    accepted: np.ndarray,
    next_token: np.ndarray,
    failed: np.ndarray,
    certainty: np.ndarray,
) -> None:
    weights = np.empty(logits.shape[1], np.float32)
    residual = np.empty(logits.shape[1], np.float32)
    for i in range(lengths.shape[0]):
        d = draft_rows[i]
        for k in range(lengths[i] + 1):
            row = logits[offsets[i] + k]
            drafted = tokens[d, k] if k < lengths[i] else -1
            position = positions[i] + k
            if temperature[i] <= 0:
                top = row_maximum(row)
                failed[i] = not np.isfinite(top)
                token = first_index(row, top)
            elif not scale_row(row, temperature[i]):
                failed[i] = True
                token = -1
            elif coupled[i]:
                filter_row(row, weights, top_k[i], top_p[i], min_p[i], False)
                token = pick(row, seed[i], position, _COUPLED)
            else:
                total = filter_row(row, weights, top_k[i], top_p[i], min_p[i], True)
                if k == 0:
                    certainty[i] = 1.0 / total  # the largest weight is 1
                token = drafted
                if drafted < 0 or d >= draft_logits.shape[0]:
                    token = draw(weights, uniform(seed[i], position, proposals[i], _RESIDUAL))
                else:
                    log_z = draft_log_z[d, k]
                    u = uniform(seed[i], position, proposals[i], _ACCEPT)
                    p_draft = _probability(draft_logits[d, k, drafted], log_z)
                    if not u * p_draft < weights[drafted] / total:
                        left = weights
                        if np.isfinite(log_z):
                            left = residual
                            _residual(weights, total, draft_logits[d, k], log_z, residual)
                        next_token[i] = draw(left, uniform(seed[i], position, proposals[i], _RESIDUAL))
                        break
            if failed[i]:
                break
            if token != drafted:
                next_token[i] = token
                break
            accepted[i] += 1


@native
def _probability(logit: np.float32, log_z: np.float32) -> float:
    return np.float64(exp_float32(logit)) * np.exp(-np.float64(log_z))


@native
def _residual(
    weights: np.ndarray, total: float, draft_row: np.ndarray, log_z: np.float32, residual: np.ndarray
) -> None:
    """residual = max(p_t − p_d, 0) with p_t = weights / total. Where rounding leaves nothing, all weight goes to the
    possible token with the largest difference. Nothing is fused: equal distributions must cancel exactly."""
    scale_target = np.float32(1.0 / total)
    scale_draft = np.float32(np.exp(-np.float64(log_z)))
    for v in range(weights.shape[0]):
        difference = weights[v] * scale_target - exp_float32(draft_row[v]) * scale_draft
        residual[v] = difference if difference > 0.0 else np.float32(0.0)
    if total_weight(residual) > 0.0:
        return
    nearest, largest = 0, np.float32(-np.inf)
    for v in range(weights.shape[0]):
        if weights[v] > 0.0:
            difference = weights[v] * scale_target - exp_float32(draft_row[v]) * scale_draft
            if difference > largest:
                nearest, largest = v, difference
    residual[nearest] = 1.0
